"""What DHA conversions of a donor layer need of it: its heads, and what each way to cluster them costs."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ...families.facts import AttentionFacts
from .grouping import Cluster, best_clusters
from .heads import Heads


@dataclass
class Observed:
    """What conversions of one donor layer read, the same for every budget; float64 on the CPU.

    Attributes:
        heads: weights and second moments.
        output_bias: (D,), of o_proj; zeros where it has none.
        norms: the donor's norms of queries and keys, float32 on the CPU; None where it has none.
        kept: the donor's KV heads that are not fused, ascending.
        costs: computed costs, by kind and cluster.
        clusters: computed clusters, by kind, number, and whether query heads of one KV head may part, and of one size.
    """

    heads: Heads
    output_bias: Tensor
    norms: tuple[nn.Module, nn.Module] | None = None
    kept: Sequence[int] = ()
    costs: dict[tuple[str, Cluster], float] = field(default_factory=dict)
    clusters: dict[tuple[str, int, bool], list[Cluster]] = field(default_factory=dict)

    @property
    def protected(self) -> dict[str, Any]:
        """The kept heads as reports have them; {} where there are none."""
        return {"protected_kv_heads": list(self.kept)} if self.kept else {}

    def lost(self, kind: str, cluster: Cluster) -> float:
        """The expected squared error of the attention output when a cluster of query heads shares one head.

        Args:
            kind: what is shared: "k" a K head, "v" a V head, "kv" one of each.
        """
        if (kind, cluster) not in self.costs:
            costs = {"k": self.heads.keys_lost, "v": self.heads.values_lost}
            self.costs[kind, cluster] = sum(costs[one](cluster) for one in kind)
        return self.costs[kind, cluster]

    def split(self, kind: str, count: int, regroup: bool, equal: bool = False) -> list[Cluster]:
        """The `count` clusters of query heads that cost least; a kept KV head's readers are one of their own.

        Args:
            kind: as in `lost`.
            regroup: whether query heads that read one KV head of the donor may come into different clusters.
            equal: whether all clusters have one size.
        """
        key = (kind, count, regroup)
        if key not in self.clusters:
            group = self.heads.group
            whole = [tuple(h for h, g in enumerate(group) if g == one) for one in range(self.heads.count)]
            own = [whole[one] for one in self.kept]
            free = [readers for one, readers in enumerate(whole) if one not in self.kept]
            units: list[Cluster] = [(h,) for readers in free for h in readers] if regroup else free

            def heads(cluster: Cluster) -> Cluster:
                return tuple(h for unit in cluster for h in units[unit])

            split: list[Cluster] = []
            if units:
                split = best_clusters(
                    len(units), count - len(own), lambda c: self.lost(kind, heads(c)), equal
                )
            self.clusters[key] = sorted([*own, *map(heads, split)])
        return self.clusters[key]


def norms(attention: Any, facts: AttentionFacts) -> tuple[nn.Module, nn.Module] | None:
    """Copies of an attention's norms of queries and keys, float32 on the CPU; None where it has none."""
    if facts.qk_norm is None:
        return None
    q_norm, k_norm = (
        copy.deepcopy(norm).to("cpu", torch.float32) for norm in (attention.q_norm, attention.k_norm)
    )
    return q_norm, k_norm
