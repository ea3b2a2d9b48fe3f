"""Closed-form surgery of one layer: grouped-query attention in, latent attention out. Pure, float64.

Shapes: H query heads, G KV heads, d head_dim, F = d / 2 rotary frequencies, D hidden_size, r kv_lora_rank,
R rotary components kept (a rotary key of 2R elements, the two of each component side by side), n components without
RoPE, w qk_nope_head_dim. The components are in `rotary_components`.

Sources: latent attention with a decoupled rotary key, DeepSeek-V2, arXiv 2405.04434, section 2.1; PCA of keys and
values, TransMLA, arXiv 2502.07864. Different here: keys and values are factorised in the metric of the queries and of
o_proj.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...attention.linalg import balance, low_rank, spreading_rotation
from ...attention.weights import AttentionWeights, LayerStatistics
from .rotary_components import RotaryBasis, SplitLayer, split_layer
from .score_rank import narrowed

TINY = torch.finfo(torch.float64).tiny
RIDGE = 1e-6  # of the rotary keys' mean energy; keeps components with almost no energy out of a regression


@dataclass(frozen=True)
class LatentWeights:
    """The converted layer, the tensors as `LatentAttention` has them.

    Attributes:
        frequencies: for each of the R rotary components, the index of its rotary frequency in the donor's.
        query_map: (H, w + 2R, d), from a head's donor query to its converted one.
        q_proj: (H (w + 2R), D), `query_map` times the donor's q_proj.
        kv_a_proj_with_mqa: (r + 2R, D).
        kv_b_proj: (H (w + d), r), or (H (w + d), r + 2R) where it reads the rotary key too.
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


def convert_layer(
    weights: AttentionWeights,
    statistics: LayerStatistics,
    basis: RotaryBasis,
    kept: Tensor,
    rank: int,
    value_weight: float,
    output_bias: bool = True,
    rope_in_latent: bool = False,
    spread: bool = False,
    score_loss: float | None = None,
    constant_cancels: bool = True,
) -> LatentWeights:
    """The latent attention nearest to `weights` that has R = kept.sum() rotary components and a latent of `rank`.

    The latent holds the other components and all values, factorised jointly: errors of keys are weighted by the queries
    that read them, errors of values by o_proj. Means stay out of the latent: the keys' cancels in the softmax, the
    values' becomes o_proj's bias. Without that bias both stay in, since a constant that the latent lacked would be
    missing in the values. With `rope_in_latent` all of this is first predicted from the rotary key by linear
    regression, and the latent holds the residual.

    Args:
        weights, statistics: of the donor's layer on the calibration text.
        basis: `rotary_basis` of the same weights and statistics.
        kept: (F, G) bool, the components that keep their RoPE.
        rank: r, the width of the latent.
        value_weight: of a relative error of the values against one of the scores.
        output_bias: whether o_proj may have a bias.
        rope_in_latent: whether kv_b_proj reads the rotary key beside the latent.
        spread: whether the latent is turned so that all its elements vary alike.
        score_loss: share of the energy of the scores without RoPE that narrower keys may lose; None: w is d.
        constant_cancels: whether narrower keys need not keep what is the same in all scores of a query.
    """
    split = split_layer(weights, statistics, basis, kept)
    price = value_weight * basis.score_energy
    reader, cached = _factorise(weights, statistics, split, rank, price, output_bias, rope_in_latent)
    missing = _missing_values(weights, statistics, split, reader, cached, output_bias)
    query_map, kv_b = _heads(weights, statistics, split, reader, cached, score_loss, constant_cancels)
    cached, kv_b, query_map = _balanced(cached, kv_b, query_map, weights.q, rank)
    if spread:
        cached, kv_b = _spread(cached, kv_b, rank)
    return LatentWeights(
        frequencies=split.frequencies,
        query_map=query_map,
        q_proj=(query_map @ weights.q).flatten(0, 1),
        kv_a_proj_with_mqa=cached,
        kv_b_proj=kv_b,
        o_proj=weights.o.flatten(1),
        o_bias=torch.einsum("Dhd,hd->D", weights.o, missing),
    )


def _heads(
    weights: AttentionWeights,
    statistics: LayerStatistics,
    split: SplitLayer,
    reader: Tensor,
    cached: Tensor,
    score_loss: float | None,
    constant_cancels: bool,
) -> tuple[Tensor, Tensor]:
    """What each query head reads with; the arguments are those of the other functions.

    Returns:
        query_map (H, w + 2R, d), and kv_b_proj: the keys of w elements without RoPE, and the values, by `reader`.
    """
    keys, head_dim = len(split.key_rows), weights.q.shape[1]
    nope_map, rope_map = split.query_map[:, :head_dim], split.query_map[:, head_dim:]
    key_up = (split.key_maps @ reader[:keys])[weights.group]  # H d r
    value_up = reader[keys:].unflatten(0, (-1, head_dim))[weights.group]  # H d r
    if score_loss is not None:
        moments = statistics.query_moment, _moment(cached[: reader.shape[1]], statistics, constant_cancels)
        nope_map, key_up = narrowed(nope_map, key_up, weights.q, moments, score_loss, rope_map.shape[1])
    return torch.cat((nope_map, rope_map), dim=1), torch.cat((key_up, value_up), dim=1).flatten(0, 1)


def _spread(cached: Tensor, kv_b: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """`cached` and `kv_b` for a latent that is turned so that all its elements vary alike; the function stays the same.

    An engine whose quantised cache rounds blocks of elements with one scale then loses least.
    """
    turn = spreading_rotation(rank)
    return (
        torch.cat((turn @ cached[:rank], cached[rank:])),
        torch.cat((kv_b[:, :rank] @ turn.mT, kv_b[:, rank:]), dim=1),
    )


def _factorise(
    weights: AttentionWeights,
    statistics: LayerStatistics,
    split: SplitLayer,
    rank: int,
    value_price: Tensor,
    output_bias: bool,
    rope_in_latent: bool,
) -> tuple[Tensor, Tensor]:
    """The latent: what it is read by, and what is cached.

    Args:
        value_price: weight of a relative error of 1 in the values; the other arguments are those of `convert_layer`.

    Returns:
        reader (2n + G d, r), or (2n + G d, r + 2R) with `rope_in_latent`: from the latent (and the rotary key) to
        `split.rows`; cached (r + 2R, D): latent and rotary key as linear functions of x.
    """
    rows, rope_keys = split.rows, split.rope_keys
    predictor = _regression(rows, rope_keys, statistics, output_bias) if rope_in_latent else None
    rest = rows if predictor is None else rows - predictor @ rope_keys
    moment = _moment(rest, statistics, output_bias)
    metric = _metric(weights, statistics, split, value_price)
    up, down = low_rank(moment, metric, rank)
    reader = up if predictor is None else torch.cat((up, predictor), dim=1)
    return reader, torch.cat((down @ rest, rope_keys))


def _missing_values(
    weights: AttentionWeights,
    statistics: LayerStatistics,
    split: SplitLayer,
    reader: Tensor,
    cached: Tensor,
    output_bias: bool,
) -> Tensor:
    """(H, d): what the values that are read from `cached` by `reader` lack of their means; 0 without `output_bias`."""
    head_dim = weights.q.shape[1]
    missing = split.rows.new_zeros(len(split.rows))
    if output_bias:
        reconstructed = reader @ (cached[: reader.shape[1]] @ statistics.key_mean)
        missing = split.rows @ statistics.key_mean - reconstructed
    return missing[len(split.key_rows) :].view(-1, head_dim)[weights.group]


def _balanced(
    cached: Tensor, kv_b: Tensor, query_map: Tensor, queries: Tensor, rank: int
) -> tuple[Tensor, Tensor, Tensor]:
    """`cached`, `kv_b` and `query_map` with factors that give what is cached and what reads it one magnitude.

    The function stays the same. Weights of one magnitude learn at one rate, and the fit's error is 3 to 9 % smaller.
    The two elements of a component have one factor. Factors are powers of two, so that nothing is rounded.

    Args:
        cached: (r + 2R, D), rows of kv_a_proj_with_mqa.
        kv_b: (n, r) or (n, r + 2R).
        query_map: (H, w + 2R, d).
        queries: (H, d, D), the donor's q_proj.
        rank: r, the width of the latent.
    """
    written, read = cached.square().mean(1), cached.new_zeros(len(cached))
    read[: kv_b.shape[1]] = kv_b.square().mean(0)
    nope_map, rope_map = query_map.split([query_map.shape[1] - len(cached) + rank, len(cached) - rank], dim=1)
    read[rank:] += (rope_map @ queries).square().mean((0, 2))
    pairs = [sizes[rank:].view(-1, 2).mean(1).repeat_interleave(2) for sizes in (written, read)]
    written, read = torch.cat((written[:rank], pairs[0])), torch.cat((read[:rank], pairs[1]))
    scale = balance(written, read)
    query_map = torch.cat((nope_map, rope_map / scale[rank:, None]), dim=1)
    return cached * scale[:, None], kv_b / scale[: kv_b.shape[1]], query_map


def _moment(rows: Tensor, statistics: LayerStatistics, centred: bool) -> Tensor:
    """(n, n), the second moment of rows · x for rows (n, D), about its mean or about zero."""
    mean = rows @ statistics.key_mean
    moment = rows @ statistics.key_moment @ rows.mT
    return moment - torch.outer(mean, mean) if centred else moment


def _regression(rows: Tensor, rope_keys: Tensor, statistics: LayerStatistics, centred: bool) -> Tensor:
    """(n, 2R): the linear regression of rows · x on rope_keys · x, about the means (`centred`) or about zero."""
    moment = statistics.key_moment
    if centred:
        moment = moment - torch.outer(statistics.key_mean, statistics.key_mean)
    seen = rope_keys @ moment @ rope_keys.mT
    ridge = (RIDGE * seen.diagonal().mean()).clamp_min(TINY) * torch.eye(len(seen), dtype=seen.dtype)
    return torch.linalg.solve(seen + ridge, rope_keys @ moment @ rows.mT).mT


def _metric(
    weights: AttentionWeights, statistics: LayerStatistics, split: SplitLayer, value_price: Tensor
) -> Tensor:
    """(2n + G d, 2n + G d): the quadratic form in which errors of [components without RoPE; values] are measured.

    Args:
        weights, statistics: of the donor's layer.
        split: its components.
        value_price: weight of a relative error of 1 in the values.
    """
    group, key_maps, nope_queries = weights.group, split.key_maps, split.nope_queries
    weighted = torch.as_tensor(weights.weight).expand(len(group))[:, None, None]
    reads = weighted * (nope_queries @ statistics.query_moment @ nope_queries.mT)  # H d d
    keys = sum(key_maps[g].mT @ reads[group == g].sum(0) @ key_maps[g] for g in range(len(key_maps)))
    assert isinstance(keys, Tensor)
    outputs = weighted * torch.einsum("Dhd,Dhe->hde", weights.o, weights.o)
    values = torch.block_diag(*(outputs[group == g].sum(0) for g in range(len(key_maps))))
    value_rows = weights.v.flatten(0, 1)
    value_energy = (values * (value_rows @ statistics.key_moment @ value_rows.mT)).sum()
    if not value_price > 0:  # there are no scores: values are all that counts
        value_price = torch.ones_like(value_price)
    price = value_price / value_energy if value_energy > 0 else torch.zeros_like(value_price)
    return torch.block_diag(keys, price * values)
