"""Closed-form surgery of one layer: clusters of K heads, and of V heads, each fused into one. Pure, float64.

Shapes: H query heads, d head_dim, D hidden_size. How each cluster is fused is in `heads`: alignment (a rotation),
averaging (weights) and rescaling (norms) are contained in one principal component analysis.

Sources: decoupled heads, DHA, arXiv 2406.06567, section 3; alignment before merging, arXiv 2412.20677.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...attention.linalg import realified
from ...attention.weights import AttentionWeights
from .heads import Cluster, Heads


@dataclass(frozen=True)
class FusedWeights:
    """A converted layer.

    Attributes:
        weights: q (H, d, D), k (n_K, d, D), v (n_V, d, D), o (D, H, d).
        o_bias: (D,), what fused values lack of the donor's means.
        k_map, v_map: (H), the K head and the V head that each query head reads.
    """

    weights: AttentionWeights
    o_bias: Tensor
    k_map: list[int]
    v_map: list[int]

    def in_groups(self) -> FusedWeights:
        """The same layer with its query heads ordered by the heads that they read: grouped-query attention."""
        order = sorted(range(len(self.k_map)), key=lambda head: (self.k_map[head], self.v_map[head], head))
        weights = replace(self.weights, q=self.weights.q[order], o=self.weights.o[:, order])
        return FusedWeights(
            weights, self.o_bias, [self.k_map[h] for h in order], [self.v_map[h] for h in order]
        )


def fuse(heads: Heads, key_clusters: Sequence[Cluster], value_clusters: Sequence[Cluster]) -> FusedWeights:
    """The layer in which each of `key_clusters` reads one K head, and each of `value_clusters` one V head."""
    donor = heads.weights
    q, o = donor.q.clone(), donor.o.clone()
    keys, values = [], []
    o_bias = o.new_zeros(len(o))
    for cluster in key_clusters:
        key, mixing = heads.fused_key(cluster)
        # conj(q) · mixing · fused = conj(q · conj(mixing)) · fused
        turn = realified(torch.diag_embed(mixing.conj()))
        q[list(cluster)] = turn @ donor.q[list(cluster)]
        keys.append(key)
    for cluster in value_clusters:
        value, maps, missing = heads.fused_value(cluster)
        members = list(cluster)
        o[:, members] = torch.einsum("Dhe,hed->Dhd", donor.o[:, members], maps)
        o_bias += torch.einsum("Dhd,hd->D", donor.o[:, members], missing)
        values.append(value)
    fused = replace(donor, q=q, k=torch.stack(keys), v=torch.stack(values), o=o)
    return FusedWeights(fused, o_bias, cluster_map(key_clusters), cluster_map(value_clusters))


def aligned(heads: Heads, key_clusters: Sequence[Cluster], value_clusters: Sequence[Cluster]) -> FusedWeights:
    """The layer before its clusters are fused: the donor's function, each head rotated towards its cluster's fused one.

    A donor's head has a copy in each cluster that reads it; `parts` says which. Keys are rotated in each RoPE plane and
    their queries with them, values by an orthogonal map and o_proj by its inverse, so the output stays the same.
    """
    donor = heads.weights
    q, o = donor.q.clone(), donor.o.clone()
    keys, values = [], []
    for cluster in key_clusters:
        _, mixing = heads.fused_key(cluster)
        turns = realified(torch.diag_embed((mixing / mixing.abs()).conj()))
        q[list(cluster)] = turns @ donor.q[list(cluster)]
        first = {heads.group[head]: turn for head, turn in reversed(list(zip(cluster, turns, strict=True)))}
        keys += [first[g] @ donor.k[g] for g in heads.donors(cluster)]
    for cluster in value_clusters:
        _, maps, _ = heads.fused_value(cluster)
        u, _, vh = torch.linalg.svd(maps)
        turns = u @ vh
        o[:, list(cluster)] = torch.einsum("Dhe,hed->Dhd", donor.o[:, list(cluster)], turns)
        first = {heads.group[head]: turn for head, turn in reversed(list(zip(cluster, turns, strict=True)))}
        values += [first[g].mT @ donor.v[g] for g in heads.donors(cluster)]
    weights = replace(donor, q=q, k=torch.stack(keys), v=torch.stack(values), o=o)
    k_map, v_map = (
        parts(cluster_map(clusters), heads.group)[0] for clusters in (key_clusters, value_clusters)
    )
    return FusedWeights(weights, o.new_zeros(len(o)), k_map, v_map)


def parts(head_map: Sequence[int], group: Sequence[int]) -> tuple[list[int], list[int]]:
    """The heads of a layer before fusion: one for each pair of a fused head and a donor's head that it is made of.

    Args:
        head_map: the fused head of each query head.
        group: the donor's KV head of each query head.

    Returns:
        Which of these heads each query head reads, and which fused head each of them becomes part of.
    """
    pairs = sorted(set(zip(head_map, group, strict=True)))
    return [pairs.index(pair) for pair in zip(head_map, group, strict=True)], [pair[0] for pair in pairs]


def cluster_map(clusters: Sequence[Cluster]) -> list[int]:
    """The index of the cluster that each head is in."""
    where = {head: index for index, cluster in enumerate(clusters) for head in cluster}
    return [where[head] for head in range(len(where))]
