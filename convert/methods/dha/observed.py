"""What the pass keeps of a donor layer whose heads are to be fused, and which of them go together best."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from .grouping import Cluster, best_clusters
from .surgery import Heads


@dataclass
class Observed:
    """All of a donor layer that its conversions read, whatever their budgets; float64 on the CPU."""

    heads: Heads
    output_bias: Tensor
    costs: dict[tuple[str, Cluster], float] = field(default_factory=dict)
    clusters: dict[tuple[str, int, bool], list[Cluster]] = field(default_factory=dict)

    def lost(self, kind: str, cluster: Cluster) -> float:
        """The cost of a cluster of query heads; kind: "k", "v", or "kv" where both share it."""
        if (kind, cluster) not in self.costs:
            costs = {"k": self.heads.keys_lost, "v": self.heads.values_lost}
            self.costs[kind, cluster] = sum(costs[one](cluster) for one in kind)
        return self.costs[kind, cluster]

    def split(self, kind: str, count: int, regroup: bool, equal: bool = False) -> list[Cluster]:
        """The best `count` clusters: of query heads, or of the donor's KV heads with all that read them."""
        key = (kind, count, regroup)
        if key not in self.clusters:
            group = self.heads.group
            units: list[Cluster] = [(h,) for h in range(len(group))]
            if not regroup:
                units = [tuple(h for h, g in enumerate(group) if g == one) for one in range(self.heads.count)]

            def heads(cluster: Cluster) -> Cluster:
                return tuple(h for unit in cluster for h in units[unit])

            found = best_clusters(len(units), count, lambda c: self.lost(kind, heads(c)), equal)
            self.clusters[key] = [heads(cluster) for cluster in found]
        return self.clusters[key]
