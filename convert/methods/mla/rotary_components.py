"""The keys of one layer as rotary components, and which of them keep their RoPE. Pure, float64.

Shapes: H query heads, G KV heads, d head_dim, F = d / 2 rotary frequencies, D hidden_size; of the F G components
R keep their RoPE (a rotary key of 2R elements, the two of each component side by side), and n do not. Elements i and
i + F of a donor's head are one complex number, which RoPE multiplies by exp(iθt) at position t; the score at
distance Δ is Re Σ conj(q) exp(−iθΔ) k.

Source: PCA of the keys across heads within a frequency, which commutes with RoPE, TransMLA (RoRoPE),
arXiv 2502.07864. Different here: the PCA is complex and weighted by the queries, components are chosen by the score
error that losing their RoPE makes, and a constant phase replaces it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...attention.linalg import complex_pca, interleaved, realified
from ...attention.weights import AttentionWeights, LayerStatistics, complex_pairs, pair_moments, second_moment


@dataclass(frozen=True)
class RotaryBasis:
    """Principal components of the keys across heads, in each rotary frequency, ordered by score variance.

    Attributes:
        mixing: (F, G, G) complex; key head g = Σ_r mixing[f, g, r] · component r.
        down: (F, G, G) complex, its inverse.
        damage: (F, G), expected squared score error when component (f, r) gets a constant phase instead of RoPE.
        score_energy: Σ over heads and frequencies of E|q|² E|k|², the scale of the scores' variance.
    """

    mixing: Tensor
    down: Tensor
    damage: Tensor
    score_energy: Tensor


@dataclass(frozen=True)
class SplitLayer:
    """A donor's layer with its components divided into those that keep their RoPE and those that do not.

    Attributes:
        frequencies: for each of the R rotary components, the index of its rotary frequency.
        rope_keys: (2R, D), interleaved: the rotary key as a linear function of x.
        query_map: (H, d + 2R, d), from a head's query to [what reads the components without RoPE; the rotary query].
        nope_queries: (H, d, D), the first of them as a linear function of x.
        key_maps: (G, d, 2n), from the components without RoPE to each head's key.
        key_rows: (2n, D), [real; imaginary]: these components as linear functions of x.
        rows: (2n + G d, D), `key_rows` and the values.
    """

    frequencies: list[int]
    rope_keys: Tensor
    query_map: Tensor
    nope_queries: Tensor
    key_maps: Tensor
    key_rows: Tensor
    rows: Tensor


def rotary_basis(weights: AttentionWeights, statistics: LayerStatistics) -> RotaryBasis:
    """Complex PCA of the keys across KV heads in each frequency, weighted by the energy of the queries that read each.

    Args:
        weights: q (H, d, D) and k (G, d, D).
        statistics: second moments, and each head's mean phases on the calibration text.
    """
    query_moment = second_moment(weights.q, statistics.query_moment)  # H d H d
    query_energy = query_moment.diagonal(0, 0, 2).diagonal(0, 0, 1).unflatten(1, (2, -1)).sum(1).mT  # F H
    kv_heads = weights.k.shape[0]
    energy = query_energy.unflatten(1, (kv_heads, -1)).sum(-1)  # F G
    energy = energy.clamp_min(energy.amax() * 1e-12) if energy.amax() > 0 else torch.ones_like(energy)
    values, vectors = complex_pca(pair_moments(weights.k, statistics.key_moment), energy)
    root = energy.sqrt().to(torch.complex128)
    share = query_energy.unflatten(1, (kv_heads, -1)) / energy.unsqueeze(-1)  # F G (heads of a group)
    lost = (statistics.rope_gain**2 - statistics.phases.abs().square()).clamp_min(0)  # H F
    lost = lost.mT.unflatten(1, (kv_heads, -1))  # F G (heads of a group)
    damage = 0.5 * values * torch.einsum("fgn,fgr->fr", share * lost, vectors.abs().square())
    return RotaryBasis(vectors / root.unsqueeze(-1), vectors.mH * root.unsqueeze(-2), damage, values.sum())


def kept_components(damage: Tensor, count: int) -> Tensor:
    """(F, G) bool: the `count` components with the largest damage, which keep their RoPE."""
    kept = torch.zeros(damage.numel(), dtype=torch.bool)
    kept[damage.flatten().argsort(descending=True, stable=True)[:count]] = True
    return kept.view(damage.shape)


def series_components(damage: Tensor, count: int) -> Tensor:
    """(F, G) bool: in each of the `count` highest frequencies, the component with the largest damage.

    The frequencies are then one geometric series for every layer (before the donor's RoPE scaling, if any), which
    stock latent-attention classes express by rope_theta and qk_rope_head_dim. The lowest frequencies are left out
    because they turn least.
    """
    kept = torch.zeros(damage.shape, dtype=torch.bool)
    kept[torch.arange(count), damage[:count].argmax(-1)] = True
    return kept


def split_layer(
    weights: AttentionWeights, statistics: LayerStatistics, basis: RotaryBasis, kept: Tensor
) -> SplitLayer:
    """Divide the components of a layer.

    Args:
        weights: q (H, d, D), k and v (G, d, D).
        statistics: of the layer; its phases replace the RoPE that components lose.
        basis: `rotary_basis` of the same weights and statistics.
        kept: (F, G) bool, the components that keep their RoPE.
    """
    frequency, component = kept.nonzero(as_tuple=True)
    nope_map = _nope_query_map(statistics.phases)  # H d d
    key_rows = _component_keys(weights, basis, *(~kept).nonzero(as_tuple=True))
    return SplitLayer(
        frequencies=frequency.tolist(),
        rope_keys=interleaved(_component_keys(weights, basis, frequency, component)),
        query_map=torch.cat((nope_map, _rope_query_map(weights, basis, frequency, component)), dim=1),
        nope_queries=nope_map @ weights.q,
        key_maps=_nope_key_maps(basis, kept),
        key_rows=key_rows,
        rows=torch.cat((key_rows, weights.v.flatten(0, 1))),
    )


def _component_keys(
    weights: AttentionWeights, basis: RotaryBasis, frequency: Tensor, component: Tensor
) -> Tensor:
    """(2n, D): n components as linear functions of x, [real; imaginary]."""
    rows = torch.einsum("kg,kgD->kD", basis.down[frequency, component], complex_pairs(weights.k)[frequency])
    return torch.cat((rows.real, rows.imag))


def _rope_query_map(
    weights: AttentionWeights, basis: RotaryBasis, frequency: Tensor, component: Tensor
) -> Tensor:
    """(H, 2R, d), interleaved: from each head's query to the kept components, q · conj(mixing of its key head)."""
    mixing = basis.mixing[frequency][:, weights.group, :]  # R H G
    chosen = mixing.gather(2, component.view(-1, 1, 1).expand(-1, mixing.shape[1], 1)).squeeze(2)  # R H
    maps = chosen.new_zeros(len(weights.q), len(frequency), basis.mixing.shape[0])  # H R F
    maps[:, torch.arange(len(frequency)), frequency] = chosen.conj().mT
    return interleaved(realified(maps))


def _nope_query_map(phases: Tensor) -> Tensor:
    """(H, d, d): the constant that replaces exp(−iθΔ) folded into the query, q · conj(phase)."""
    return realified(torch.diag_embed(phases.conj()))


def _nope_key_maps(basis: RotaryBasis, kept: Tensor) -> Tensor:
    """(G, d, 2n): from the n components without RoPE, [real; imaginary], to each head's half-split key."""
    frequency, component = (~kept).nonzero(as_tuple=True)
    frequencies, kv_heads = kept.shape
    maps = torch.zeros(kv_heads, frequencies, len(frequency), dtype=torch.complex128)
    maps[:, frequency, torch.arange(len(frequency))] = basis.mixing[frequency, :, component].mT
    return realified(maps)
