"""Closed-form surgery of one layer: grouped-query attention in, latent attention out. Pure, float64.

Shapes: H query heads, G KV heads, d head_dim, F = d / 2 rotary frequencies, D hidden_size, r kv_lora_rank,
R rotary components kept (a rotary key of 2R elements, the two of each component side by side). Elements i and i + F
of a donor's head are one complex number, which RoPE multiplies by exp(iθt) at position t; the score at distance Δ is
Re Σ conj(q) exp(−iθΔ) k.

Sources: latent attention with a decoupled rotary key, DeepSeek-V2, arXiv 2405.04434, section 2.1; PCA of the keys
across heads within a frequency, which commutes with RoPE, TransMLA (RoRoPE), arXiv 2502.07864. Different here: the PCA
is complex and weighted by the queries, components are chosen by the score error that losing their RoPE makes, a
constant phase replaces it, and keys and values are factorised in the metric of the queries and of o_proj.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...attention.linalg import balance, complex_pca, interleaved, low_rank, realified
from ...attention.weights import AttentionWeights, LayerStatistics, complex_pairs, pair_moments, second_moment

TINY = torch.finfo(torch.float64).tiny
RIDGE = 1e-6  # of the rotary keys' mean energy; keeps components with almost no energy out of a regression


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
class LatentWeights:
    """The converted layer, the tensors as `LatentAttention` has them.

    Attributes:
        frequencies: for each of the R rotary components, the index of its rotary frequency in the donor's.
        query_map: (H, d + 2R, d), from a head's donor query to its converted one.
        q_proj: (H (d + 2R), D), `query_map` times the donor's q_proj.
        kv_a_proj_with_mqa: (r + 2R, D).
        kv_b_proj: (H 2d, r), or (H 2d, r + 2R) where it reads the rotary key too.
        o_proj: (D, H d).
        o_bias: (D,), what the latent leaves out of the values' means.
    """

    frequencies: list[int]
    query_map: Tensor
    q_proj: Tensor
    kv_a_proj_with_mqa: Tensor
    kv_b_proj: Tensor
    o_proj: Tensor
    o_bias: Tensor


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
    share = query_energy.unflatten(1, (kv_heads, -1)) / energy.unsqueeze(
        -1
    )  # F G n: of each head in its group
    lost = (statistics.rope_gain**2 - statistics.phases.abs().square()).clamp_min(0)  # H F
    lost = lost.mT.unflatten(1, (kv_heads, -1))  # F G n
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


def convert_layer(
    weights: AttentionWeights,
    statistics: LayerStatistics,
    basis: RotaryBasis,
    kept: Tensor,
    rank: int,
    value_weight: float,
    output_bias: bool = True,
    rope_in_latent: bool = False,
) -> LatentWeights:
    """The latent attention nearest to `weights` that has R = kept.sum() rotary components and a latent of `rank`.

    The latent holds the other components and all values, factorised jointly: errors of keys are weighted by the queries
    that read them, errors of values by o_proj. Means stay out of the latent: the keys' cancels in the softmax, the
    values' becomes o_proj's bias. Without that bias both stay in, since a constant that the latent lacked would be
    missing in the values. With `rope_in_latent` all of this is first predicted from the rotary key by linear
    regression, and the latent holds the residual.

    Args:
        weights: of the donor's layer.
        basis: `rotary_basis` of the same weights and statistics.
        kept: (F, G) bool, the components that keep their RoPE.
        rank: r, the width of the latent.
        value_weight: of a relative error of the values against one of the scores.
        output_bias: whether o_proj may have a bias.
        rope_in_latent: whether kv_b_proj reads the rotary key beside the latent.
    """
    frequency, component = kept.nonzero(as_tuple=True)
    rope_keys = interleaved(_component_keys(weights, basis, frequency, component))
    nope_map = _nope_query_map(statistics.phases)  # H d d
    query_map = torch.cat((nope_map, _rope_query_map(weights, basis, frequency, component)), dim=1)
    nope_queries = nope_map @ weights.q  # H d D
    key_maps = _nope_key_maps(basis, kept)  # G d 2n: from the components without RoPE to each head's key
    key_rows = _component_rows(weights, basis, kept)  # 2n D

    rows = torch.cat((key_rows, weights.v.flatten(0, 1)))  # y = rows @ x
    mean = rows @ statistics.key_mean if output_bias else rows.new_zeros(len(rows))
    predictor = _regression(rows, rope_keys, statistics, output_bias) if rope_in_latent else None
    rest = rows if predictor is None else rows - predictor @ rope_keys
    rest_mean = rest @ statistics.key_mean if output_bias else torch.zeros_like(mean)
    moment = rest @ statistics.key_moment @ rest.mT - torch.outer(rest_mean, rest_mean)
    metric = _metric(weights, statistics, nope_queries, key_maps, value_weight * basis.score_energy)
    up, down = low_rank(moment, metric, rank)
    reader = up if predictor is None else torch.cat((up, predictor), dim=1)
    cached = torch.cat((down @ rest, rope_keys))

    group, keys = weights.group, key_rows.shape[0]
    head_dim = weights.q.shape[1]
    key_up = (key_maps @ reader[:keys])[group]  # H d r
    value_up = reader[keys:].unflatten(0, (-1, head_dim))[group]  # H d r
    reconstructed = reader @ (cached[: reader.shape[1]] @ statistics.key_mean) if output_bias else mean
    missing_values = (mean - reconstructed)[keys:].view(-1, head_dim)[group]  # H d
    kv_b = torch.cat((key_up, value_up), dim=1).flatten(0, 1)
    scale = _balance(cached, kv_b, query_map @ weights.q, rank)
    query_map = torch.cat((query_map[:, :head_dim], query_map[:, head_dim:] / scale[rank:, None]), dim=1)
    return LatentWeights(
        frequencies=frequency.tolist(),
        query_map=query_map,
        q_proj=(query_map @ weights.q).flatten(0, 1),
        kv_a_proj_with_mqa=cached * scale[:, None],
        kv_b_proj=kv_b / scale[: kv_b.shape[1]],
        o_proj=weights.o.flatten(1),
        o_bias=torch.einsum("Dhd,hd->D", weights.o, missing_values),
    )


def _balance(cached: Tensor, kv_b: Tensor, queries: Tensor, rank: int) -> Tensor:
    """Factors for the cached elements, by whose inverses their readers are multiplied: both then have one magnitude.

    The function stays the same. Weights of one magnitude learn at one rate, and the fit's error is 3 to 9 % smaller.
    The two elements of a component have one factor. Factors are powers of two, so that nothing is rounded.

    Args:
        cached: (r + 2R, D), rows of kv_a_proj_with_mqa.
        kv_b: (n, r) or (n, r + 2R).
        queries: (H, d + 2R, D).
    Returns:
        (r + 2R,).
    """
    written, read = cached.square().mean(1), cached.new_zeros(len(cached))
    read[: kv_b.shape[1]] = kv_b.square().mean(0)
    read[rank:] += queries[:, queries.shape[1] - len(cached) + rank :].square().mean((0, 2))
    pairs = [sizes[rank:].view(-1, 2).mean(1).repeat_interleave(2) for sizes in (written, read)]
    written, read = torch.cat((written[:rank], pairs[0])), torch.cat((read[:rank], pairs[1]))
    return balance(written, read)


def _regression(rows: Tensor, rope_keys: Tensor, statistics: LayerStatistics, centred: bool) -> Tensor:
    """(n, 2R): the linear regression of rows · x on rope_keys · x, about the means (`centred`) or about zero."""
    moment = statistics.key_moment
    if centred:
        moment = moment - torch.outer(statistics.key_mean, statistics.key_mean)
    seen = rope_keys @ moment @ rope_keys.mT
    ridge = (RIDGE * seen.diagonal().mean()).clamp_min(TINY) * torch.eye(len(seen), dtype=seen.dtype)
    return torch.linalg.solve(seen + ridge, rope_keys @ moment @ rows.mT).mT


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


def _component_rows(weights: AttentionWeights, basis: RotaryBasis, kept: Tensor) -> Tensor:
    """(2n, D): the components without RoPE as linear functions of x, [real; imaginary]."""
    frequency, component = (~kept).nonzero(as_tuple=True)
    return _component_keys(weights, basis, frequency, component)


def _metric(
    weights: AttentionWeights,
    statistics: LayerStatistics,
    nope_queries: Tensor,
    key_maps: Tensor,
    value_price: Tensor,
) -> Tensor:
    """The quadratic form in which errors of [components without RoPE; values] are measured.

    Args:
        nope_queries: (H, d, D), the queries that read the components without RoPE.
        key_maps: (G, d, 2n), from those components to each head's key.
        value_price: weight of a relative error of 1 in the values.
    """
    group = weights.group
    reads = nope_queries @ statistics.query_moment @ nope_queries.mT  # H d d
    keys = sum(key_maps[g].mT @ reads[group == g].sum(0) @ key_maps[g] for g in range(len(key_maps)))
    assert isinstance(keys, Tensor)
    outputs = torch.einsum("Dhd,Dhe->hde", weights.o, weights.o)
    values = torch.block_diag(*(outputs[group == g].sum(0) for g in range(len(key_maps))))
    value_rows = weights.v.flatten(0, 1)
    value_energy = (values * (value_rows @ statistics.key_moment @ value_rows.mT)).sum()
    value_price = (
        value_price if value_price > 0 else torch.ones_like(value_price)
    )  # no scores: values are all
    price = value_price / value_energy if value_energy > 0 else torch.zeros_like(value_price)
    return torch.block_diag(keys, price * values)
