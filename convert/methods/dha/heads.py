"""The heads of one layer, what fusing a cluster of them loses, and the head that loses least. Pure, float64.

Shapes: H query heads, G KV heads of the donor, d head_dim, F = d / 2 rotary frequencies, D hidden_size; pairs as in
`convert.attention`. A cluster is a tuple of query heads that read one fused head in common.

Attention depends on keys only through their products with queries, and on values only through o_proj. Rotating a key
pair together with the query pair, or applying a linear map to a value and its inverse to o_proj, changes nothing. So in
each frequency the best fused key of a cluster is the first complex principal component of its keys, weighted by the
energy of the queries that read them; the best fused value head consists of the first d principal components of the
values, weighted by o_proj. These components contain alignment (a rotation), averaging (weights) and rescaling (norms).

Sources: decoupled heads, DHA, arXiv 2406.06567, section 3; alignment before merging, arXiv 2412.20677.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ...attention.linalg import balance, low_rank
from ...attention.weights import AttentionWeights, LayerStatistics, complex_pairs, pair_moments, second_moment

TINY = torch.finfo(torch.float64).tiny
LEAST_ENERGY = 1e-9  # of a frequency's largest: a floor for queries that the text hardly has

Cluster = tuple[int, ...]


@dataclass(frozen=True)
class Heads:
    """A donor layer before its heads are fused.

    Attributes:
        weights: q (H, d, D), k and v (G, d, D), o (D, H, d).
        statistics: second moments on the calibration text.
        scale: the factor of the scores before the softmax.
        output_bias: whether the result's o_proj has a bias, which can hold the values' means.
    """

    weights: AttentionWeights
    statistics: LayerStatistics
    scale: float
    output_bias: bool = True

    @cached_property
    def group(self) -> list[int]:
        """(H), the donor's KV head that each query head reads."""
        return self.weights.group.tolist()

    @cached_property
    def key_moments(self) -> Tensor:
        """(F, G, G) complex: E[k kᴴ] in each frequency."""
        return pair_moments(self.weights.k, self.statistics.key_moment)

    @cached_property
    def query_energy(self) -> Tensor:
        """(F, H): the squared output error per squared error of a key pair: ½ E|q|² (a score is a real part) · E‖o v‖².

        An error in a score changes the output by the attention weight times (v − E v), an error in a value by the
        attention weight times the error. Both are counted for an attention weight of 1.
        """
        moment = second_moment(self.weights.q, self.statistics.query_moment)
        energy = moment.diagonal(0, 0, 2).diagonal(0, 0, 1).unflatten(1, (2, -1)).sum(1).mT
        energy = 0.5 * self.scale**2 * energy * self.head_energy
        least = LEAST_ENERGY * energy.amax().clamp_min(TINY)
        return energy.clamp_min(least)

    @cached_property
    def head_energy(self) -> Tensor:
        """(H,): E‖o_h (v − E v)‖², the variance of a head's output over the tokens that it may attend to."""
        values = self.value_moment.view(self.count, self.width, self.count, self.width)
        own = torch.stack([values[g, :, g] for g in self.group])
        return (self.value_metric * own).sum((1, 2)).clamp_min(0)

    @cached_property
    def value_mean(self) -> Tensor:
        """(G d,): E v."""
        return self.weights.v.flatten(0, 1) @ self.statistics.key_mean

    @cached_property
    def value_moment(self) -> Tensor:
        """(G d, G d): E[v vᵀ], about the mean where o_proj's bias can hold that."""
        rows, mean = self.weights.v.flatten(0, 1), self.value_mean
        moment = rows @ self.statistics.key_moment @ rows.mT
        if not self.output_bias:
            return moment
        # Shrinkage of the moment on short text can leave less energy along the mean than the mean itself has.
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
        """The donor's KV heads that a cluster reads, ascending."""
        return sorted({self.group[head] for head in cluster})

    def keys_lost(self, cluster: Cluster) -> float:
        """The expected squared error of the output when the cluster reads one fused K head; see `query_energy`."""
        kept = self.donors(cluster)
        if len(kept) == 1:
            return 0.0
        values = torch.linalg.eigvalsh(self._weighted_keys(cluster, kept))
        return float(values[:, :-1].clamp_min(0).sum())

    def values_lost(self, cluster: Cluster) -> float:
        """The expected squared error of the output when the cluster reads one fused V head."""
        kept = self.donors(cluster)
        if len(kept) == 1:
            return 0.0
        moment, metric = self._values(cluster, kept)
        root = torch.linalg.cholesky_ex(metric + _ridge(metric)).L
        values = torch.linalg.eigvalsh(root.mT @ moment @ root)
        return float(values[: -self.width].clamp_min(0).sum())

    def fused_key(self, cluster: Cluster) -> tuple[Tensor, Tensor]:
        """The fused K head (d, D), and complex factors (len(cluster), F) for its members: key ≈ factor · fused key."""
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
        """The fused V head (d, D); maps (len(cluster), d, d) of its members: value ≈ map @ fused value; and the means
        (len(cluster), d) that are missing then."""
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
        """(F, U): for each of the U donor heads that a cluster reads, the energy of the queries that read it."""
        return torch.stack(
            [self.query_energy[:, [h for h in cluster if self.group[h] == g]].sum(1) for g in kept], dim=1
        )

    def _weighted_keys(self, cluster: Cluster, kept: Sequence[int]) -> Tensor:
        """(F, U, U): second moments of a cluster's keys, weighted on both sides by the root of `_demand`."""
        root = self._demand(cluster, kept).sqrt()
        return root.unsqueeze(2) * self.key_moments[:, kept][:, :, kept] * root.unsqueeze(1)

    def _values(self, cluster: Cluster, kept: Sequence[int]) -> tuple[Tensor, Tensor]:
        """(U d, U d) each: second moment of a cluster's values, and their metric through o_proj."""
        rows = torch.cat([torch.arange(g * self.width, (g + 1) * self.width) for g in kept])
        members = [[h for h in cluster if self.group[h] == g] for g in kept]
        metric = torch.block_diag(*(self.value_metric[heads].sum(0) for heads in members))
        return self.value_moment[rows][:, rows], metric


def _ridge(metric: Tensor) -> Tensor:
    """What is added to a metric that may be singular before it is factorised."""
    return (
        LEAST_ENERGY * metric.diagonal().mean().clamp_min(TINY) * torch.eye(len(metric), dtype=metric.dtype)
    )
