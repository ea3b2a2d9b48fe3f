"""Closed-form surgery of one layer: several K heads, and several V heads, made one. Pure, float64.

Shapes: H query heads, G KV heads of the donor, d head_dim, F = d / 2 rotary frequencies, D hidden_size; pairs as in
`convert.attention`. A cluster is a tuple of query heads, which read one fused head in common.

What attention sees of keys are the products with its queries, and of values what o_proj makes of them. A turn of a key
pair that its query's pair shares, and any linear map of a value that o_proj undoes, leave both as they are. So in a
frequency the best fused key of a cluster is the first complex principal component of its keys, weighted by the energy
of the queries that read them; and the best fused value head the first d principal components of its values, weighted
by o_proj. Alignment (a turn), averaging (its weights) and restored norms are what these components consist of.
Decoupled heads: DHA, arXiv 2406.06567, section 3; aligned before they are merged: arXiv 2412.20677.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from ...attention.linalg import balance, low_rank, realified
from ...attention.weights import AttentionWeights, LayerStatistics, complex_pairs, pair_moments, second_moment

TINY = torch.finfo(torch.float64).tiny
LEAST_ENERGY = 1e-9  # of a frequency's largest: queries that the text hardly has still read something

Cluster = tuple[int, ...]


@dataclass(frozen=True)
class Heads:
    """A donor layer before its heads are fused. scale: what scores are multiplied by; output_bias: whether o_proj can
    take over the values' means."""

    weights: AttentionWeights
    statistics: LayerStatistics
    scale: float
    output_bias: bool = True

    @cached_property
    def group(self) -> list[int]:
        """The donor's KV head of each query head."""
        return self.weights.group.tolist()

    @cached_property
    def key_moments(self) -> Tensor:
        """(F, G, G) complex: E[k kᴴ] in each frequency."""
        return pair_moments(self.weights.k, self.statistics.key_moment)

    @cached_property
    def query_energy(self) -> Tensor:
        """(F, H): half of E|q|² of a query's pair (a score is a real part), as an energy of the head's output.

        An error in a score moves the output by the attention weight times (v − its mean), an error in a value by the
        attention weight times itself: both are counted for an attention weight of 1.
        """
        moment = second_moment(self.weights.q, self.statistics.query_moment)
        energy = moment.diagonal(0, 0, 2).diagonal(0, 0, 1).unflatten(1, (2, -1)).sum(1).mT
        energy = 0.5 * self.scale**2 * energy * self.head_energy
        least = LEAST_ENERGY * energy.amax().clamp_min(TINY)
        return energy.clamp_min(least)

    @cached_property
    def head_energy(self) -> Tensor:
        """(H,): E‖o_h (v − E v)‖², how much a head's output varies with what it attends to."""
        values = self.value_moment.view(self.count, self.width, self.count, self.width)
        own = torch.stack([values[g, :, g] for g in self.group])
        return (self.value_metric * own).sum((1, 2)).clamp_min(0)

    @cached_property
    def value_mean(self) -> Tensor:
        """(G d,)."""
        return self.weights.v.flatten(0, 1) @ self.statistics.key_mean

    @cached_property
    def value_moment(self) -> Tensor:
        """(G d, G d): E[v vᵀ], about the mean where o_proj's bias can hold that."""
        rows, mean = self.weights.v.flatten(0, 1), self.value_mean
        moment = rows @ self.statistics.key_moment @ rows.mT
        if not self.output_bias:
            return moment
        # Of short text the moment has been spread over all directions, and the mean is more than its share of it.
        values, vectors = torch.linalg.eigh(moment - torch.outer(mean, mean))
        return (vectors * values.clamp_min(0)) @ vectors.mT

    @cached_property
    def value_metric(self) -> Tensor:
        """(H, d, d): o_hᵀ o_h."""
        return torch.einsum("Dhd,Dhe->hde", self.weights.o, self.weights.o)

    @property
    def count(self) -> int:
        return len(self.weights.k)

    @property
    def width(self) -> int:
        return self.weights.k.shape[1]

    def donors(self, cluster: Cluster) -> list[int]:
        """The donor's KV heads that a cluster reads, in order."""
        return sorted({self.group[head] for head in cluster})

    def keys_lost(self, cluster: Cluster) -> float:
        """The expected squared error of the output when the cluster's keys are one head's; see `query_energy`."""
        kept = self.donors(cluster)
        if len(kept) == 1:
            return 0.0
        values = torch.linalg.eigvalsh(self._weighted_keys(cluster, kept))
        return float(values[:, :-1].clamp_min(0).sum())

    def values_lost(self, cluster: Cluster) -> float:
        """The same when the cluster's values are one head's."""
        kept = self.donors(cluster)
        if len(kept) == 1:
            return 0.0
        moment, metric = self._values(cluster, kept)
        root = torch.linalg.cholesky_ex(metric + _ridge(metric)).L
        values = torch.linalg.eigvalsh(root.mT @ moment @ root)
        return float(values[: -self.width].clamp_min(0).sum())

    def fused_key(self, cluster: Cluster) -> tuple[Tensor, Tensor]:
        """The key head (d, D) of a cluster; turns and gains of its members (len(cluster), F): key ≈ mixing · fused."""
        kept = self.donors(cluster)
        demand = self._demand(cluster, kept)  # F U
        _, vectors = torch.linalg.eigh(self._weighted_keys(cluster, kept))
        first = vectors[..., -1]  # F U
        largest = first.gather(1, first.abs().argmax(1, keepdim=True))
        first = first * (largest.conj() / largest.abs())
        share = (demand / demand.sum(1, keepdim=True)).sqrt()
        rows = torch.einsum("fu,fuD->fD", first.conj() * share, complex_pairs(self.weights.k[kept]))
        mixing = first / share  # F U
        places = [kept.index(self.group[head]) for head in cluster]
        return torch.cat((rows.real, rows.imag)), mixing[:, places].mT

    def fused_value(self, cluster: Cluster) -> tuple[Tensor, Tensor, Tensor]:
        """The value head (d, D) of a cluster; for its members the map (len(cluster), d, d): value ≈ map @ fused; and
        what then is missing of the values' means (len(cluster), d)."""
        kept = self.donors(cluster)
        places = [kept.index(self.group[head]) for head in cluster]
        if len(kept) == 1:
            eye = torch.eye(self.width, dtype=torch.float64).expand(len(cluster), -1, -1)
            return self.weights.v[kept[0]], eye, eye.new_zeros(len(cluster), self.width)
        moment, metric = self._values(cluster, kept)
        up, down = low_rank(moment, metric, self.width)
        rows = self.weights.v[kept].flatten(0, 1)
        scale = balance((down @ rows).square().mean(1), up.square().mean(0))
        up, down = up / scale, down * scale.unsqueeze(1)
        mean = self.value_mean.view(self.count, -1)[kept].flatten()
        missing = mean - up @ (down @ mean) if self.output_bias else torch.zeros_like(mean)
        maps = up.view(len(kept), self.width, self.width)[places]
        return down @ rows, maps, missing.view(len(kept), self.width)[places]

    def _demand(self, cluster: Cluster, kept: Sequence[int]) -> Tensor:
        """(F, U): the energy of the cluster's queries that read each of its donor heads."""
        return torch.stack(
            [self.query_energy[:, [h for h in cluster if self.group[h] == g]].sum(1) for g in kept], dim=1
        )

    def _weighted_keys(self, cluster: Cluster, kept: Sequence[int]) -> Tensor:
        """(F, U, U): the keys' moments, weighted on both sides by the root of the demand."""
        root = self._demand(cluster, kept).sqrt()
        return root.unsqueeze(2) * self.key_moments[:, kept][:, :, kept] * root.unsqueeze(1)

    def _values(self, cluster: Cluster, kept: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Moment and metric (U d, U d) of a cluster's values."""
        rows = torch.cat([torch.arange(g * self.width, (g + 1) * self.width) for g in kept])
        members = [[h for h in cluster if self.group[h] == g] for g in kept]
        metric = torch.block_diag(*(self.value_metric[heads].sum(0) for heads in members))
        return self.value_moment[rows][:, rows], metric


@dataclass(frozen=True)
class FusedWeights:
    """A converted layer: q (H, d, D), k (n_K, d, D), v (n_V, d, D), o (D, H, d), o_bias (D,); which K head and which V
    head each query head reads."""

    weights: AttentionWeights
    o_bias: Tensor
    k_map: list[int]
    v_map: list[int]

    def in_groups(self) -> FusedWeights:
        """The same layer, its query heads in the order of the heads that they read, as grouped queries have it."""
        order = sorted(range(len(self.k_map)), key=lambda head: (self.k_map[head], self.v_map[head], head))
        weights = replace(self.weights, q=self.weights.q[order], o=self.weights.o[:, order])
        return FusedWeights(
            weights, self.o_bias, [self.k_map[h] for h in order], [self.v_map[h] for h in order]
        )


def fuse(heads: Heads, key_clusters: Sequence[Cluster], value_clusters: Sequence[Cluster]) -> FusedWeights:
    """The layer in which each cluster of query heads reads one K head, and each of the others one V head."""
    donor = heads.weights
    q, o = donor.q.clone(), donor.o.clone()
    keys, values = [], []
    o_bias = o.new_zeros(len(o))
    for cluster in key_clusters:
        key, mixing = heads.fused_key(cluster)
        turn = realified(
            torch.diag_embed(mixing.conj())
        )  # conj(q) · mixing · fused = conj(q · conj(mixing)) · fused
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
    """The layer before its clusters are fused: as the donor, each head turned towards what its cluster would be.

    A donor's head has a copy in each cluster that reads it; `parts` says which. Keys are turned in each RoPE plane and
    their queries with them, values by an orthogonal map and o_proj by its inverse: nothing is lost.
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
    """The heads of a layer before those that `head_map` names are fused: one for each donor's head in each of them.

    group: the donor's KV head of each query head. Returns which of them each query head reads, and what each becomes.
    """
    found = sorted(set(zip(head_map, group, strict=True)))
    return [found.index(pair) for pair in zip(head_map, group, strict=True)], [pair[0] for pair in found]


def cluster_map(clusters: Sequence[Cluster]) -> list[int]:
    """Which cluster each head is in."""
    where = {head: index for index, cluster in enumerate(clusters) for head in cluster}
    return [where[head] for head in range(len(where))]


def _ridge(metric: Tensor) -> Tensor:
    return (
        LEAST_ENERGY * metric.diagonal().mean().clamp_min(TINY) * torch.eye(len(metric), dtype=metric.dtype)
    )
