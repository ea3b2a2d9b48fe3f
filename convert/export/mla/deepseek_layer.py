"""One layer of latent attention as DeepSeek's classes hold it. Pure: tensors in, float64 tensors out.

Three differences are folded into the weights:

- Their latent passes through an RMSNorm, ours does not. When the latent's rows of kv_a_proj are scaled by a tiny s, the
  norm's eps outweighs their mean square, and RMSNorm(s x) · w = x with w = sqrt(eps) / s.
- Their scores are multiplied by (qk_nope_head_dim + qk_rope_head_dim) ** -0.5; q_proj takes the ratio to the donor's.
- All their norms have one eps. In a residual stream scaled by g = sqrt(eps' / eps), norms with eps' do what those with
  eps did, so embedding, o_proj and down_proj are multiplied by g.

Rows of q_proj and kv_b_proj are heads, non-rotary part first; rotary pairs lie side by side, as DeepSeek's do.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

EPS = 1e-6  # of the latent's norm in transformers, whatever rms_norm_eps says
IDENTITY_ERROR = 2.0**-26  # relative deviation of the norm from an identity, for the largest latent
MARGIN = 64.0  # how much larger the RMS of a latent may be than that of the largest one observed
SMALLEST = 2.0**-40  # of s: well above the smallest numbers of float32 and bfloat16


@dataclass(frozen=True)
class LatentShape:
    """Widths of one model's latent attention.

    Attributes:
        padded_v_head_dim: to which values are padded with zeros.
    """

    num_heads: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    padded_v_head_dim: int


@dataclass(frozen=True)
class Fold:
    """The factors that are folded into a layer's weights.

    Attributes:
        latent: s, of the latent's rows of kv_a_proj.
        norm: w, the norm's weight, rounded to the dtype that it is stored in.
        correction: the ratio of the rounded w to the exact one.
        scores: the donor's factor of the scores divided by the class's.
        residual: g, of the residual stream.
    """

    latent: float
    norm: float
    correction: float
    scores: float
    residual: float


def latent_scale(largest_mean_square: float) -> float:
    """s, a power of two for which the norm is an identity for latents up to MARGIN times the largest.

    Args:
        largest_mean_square: of the unscaled latent over its elements, of the worst token observed.
    """
    reach = max(largest_mean_square, 1.0) * MARGIN**2
    wanted = math.sqrt(2 * EPS * IDENTITY_ERROR / reach)
    return max(2.0 ** math.floor(math.log2(wanted)), SMALLEST)


def fold(
    largest_mean_square: float,
    softmax_scale: float,
    shape: LatentShape,
    rms_norm_eps: float,
    dtype: torch.dtype,
) -> Fold:
    """The factors for a layer that is stored in `dtype`; see `Fold`."""
    scale = latent_scale(largest_mean_square)
    exact = math.sqrt(EPS) / scale
    stored = torch.tensor(exact, dtype=dtype).item()
    query_width = shape.qk_nope_head_dim + shape.qk_rope_head_dim
    return Fold(
        latent=scale,
        norm=stored,
        correction=stored / exact,
        scores=softmax_scale * math.sqrt(query_width),
        residual=math.sqrt(EPS / rms_norm_eps),
    )


def dense_attention(
    tensors: dict[str, Tensor], shape: LatentShape, fold: Fold, order: list[int]
) -> dict[str, Tensor]:
    """The tensors of one DeepSeek attention from those of one LatentAttention, by name; float64.

    Args:
        tensors: q_proj (H (n + p), D), kv_a_proj_with_mqa (r + p, D), kv_b_proj (H (n + v), r), o_proj (D, H v), all
            `.weight`.
        order: (p / 2), for each of their rotary components the index of ours.
    """
    heads, rank = shape.num_heads, shape.kv_lora_rank
    nope, value, padded = shape.qk_nope_head_dim, shape.v_head_dim, shape.padded_v_head_dim
    pairs = [element for component in order for element in (2 * component, 2 * component + 1)]
    query = tensors["q_proj.weight"].double().unflatten(0, (heads, -1)) * fold.scores
    query = torch.cat((query[:, :nope] / fold.correction, query[:, nope:][:, pairs]), dim=1)
    reads = tensors["kv_a_proj_with_mqa.weight"].double()
    reads = torch.cat((reads[:rank] * fold.latent, reads[rank:][pairs]))
    up = tensors["kv_b_proj.weight"].double().unflatten(0, (heads, -1))
    up = torch.cat((up, up.new_zeros(heads, padded - value, rank)), dim=1)
    out = tensors["o_proj.weight"].double().unflatten(1, (heads, value)) * (fold.residual / fold.correction)
    out = torch.cat((out, out.new_zeros(len(out), heads, padded - value)), dim=2)
    return {
        "q_proj.weight": query.flatten(0, 1),
        "kv_a_proj_with_mqa.weight": reads,
        "kv_a_layernorm.weight": torch.full((rank,), fold.norm, dtype=torch.float64),
        "kv_b_proj.weight": up.flatten(0, 1),
        "o_proj.weight": out.flatten(1),
    }


def series_order(frequencies: list[int]) -> tuple[int, list[int]] | None:
    """A layer's rotary components as a geometric series of frequencies, which stock classes compute themselves.

    Args:
        frequencies: for each component, the index of its frequency in the donor's; 0, step, 2 · step, … are a series.
    Returns:
        The step, and the component that turns with each frequency of the series; None for other frequencies.
    """
    ordered = sorted(frequencies)
    step = ordered[1] if len(ordered) > 1 else 1
    if not ordered or step < 1 or ordered != [step * index for index in range(len(ordered))]:
        return None
    return step, [frequencies.index(frequency) for frequency in ordered]


def series_theta(rope_theta: float, step: int, qk_rope_head_dim: int, head_dim: int) -> float:
    """The base whose series over qk_rope_head_dim elements is every step-th frequency of the donor's over head_dim:
    theta' ** (-2 i / p) = theta ** (-2 step i / d)."""
    return float(rope_theta ** (step * qk_rope_head_dim / head_dim))


def of_a_row(rope: dict[str, Any], shape: LatentShape) -> dict[str, Any]:
    """head_dim of a cached row, by which vLLM sizes the cache of a class that it does not know, and RoPE beside it.

    Youtu's own RoPE turns all of head_dim; of the types that turn a share of it, linear with factor 1 is the same.
    """
    row, turned = shape.kv_lora_rank + shape.qk_rope_head_dim, shape.qk_rope_head_dim
    share = turned / row
    if int(row * share) < turned:  # as transformers computes it
        share = math.nextafter(share, 1.0)
    if rope.get("rope_type", "default") == "default":
        rope = rope | {"rope_type": "linear", "factor": 1.0}
    return {"head_dim": row, "rope_parameters": rope | {"partial_rotary_factor": share}}
