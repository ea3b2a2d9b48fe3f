"""A portable MLA checkpoint as configuration and tensors of the served class, `convert.methods.mla.served`.

The class has what stock classes would drop: biases, any fixed RoPE scaling, frequencies in any order. Two things are
added, and no weight changes. The latent has a norm: RMSNorm(s x) · w is x where w = sqrt(eps) / s and s² mean(x²) is
far below eps, which is free here, so that s = 1. Values, and the latent where a user wants
that, are padded with zeros to a width that vLLM's kernels take.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor

from mhconvert.errors import ExportError

from ...families.facts import class_free_values
from ...methods.mla.served.served_class import served_class
from ...storage.dtype_cast import cast
from ..engine_support import padded_value
from .padded_row import padded_rank

# Powers of four, so that w is a power of two. The norm deviates from an identity by mean(x²) / 2 w². Kernels round
# x / w to the dtype before they multiply by w; float16, with few exponents, needs a smaller w.
EPS, EPS_FLOAT16 = 2.0**30, 2.0**24


@dataclass(frozen=True)
class ServedShape:
    """Widths of one layer's attention; values are padded with zeros to padded_v_head_dim ≥ v_head_dim."""

    num_heads: int
    kv_lora_rank: int
    v_head_dim: int
    padded_v_head_dim: int


def norm_weight(s: float, eps: float) -> float:
    """sqrt(eps) / s. Raises ExportError where that or s is no power of two, so that bfloat16 would round."""
    if s > 0 and eps > 0:
        weight = math.sqrt(eps) / s
        if math.frexp(s)[0] == 0.5 == math.frexp(weight)[0]:
            return weight
    raise ExportError(f"s={s} and eps={eps} are no powers of two and four, and the latent would be rounded")


def served_tensors(
    tensors: dict[str, Tensor], shape: ServedShape, *, s: float = 1.0, eps: float = EPS
) -> dict[str, Tensor]:
    """The tensors of a `ServedLatentAttention` from those of a `LatentAttention`, by name; dtypes are kept.

    Args:
        tensors: q_proj (H (n + p), D), kv_a_proj_with_mqa (r + p, D), kv_b_proj (H (n + v), r), o_proj (D, H v), all
            `.weight`, and any of their `.bias`.
        s: factor of the latent's rows before a norm with `eps`.
    Raises:
        ExportError: for an s or eps that leads to rounding.
    """
    heads, rank = shape.num_heads, shape.kv_lora_rank
    zeros = shape.padded_v_head_dim - shape.v_head_dim
    made = dict(tensors)
    for name in ("kv_a_proj_with_mqa.weight", "kv_a_proj_with_mqa.bias"):
        if name in tensors:
            made[name] = torch.cat((tensors[name][:rank] * s, tensors[name][rank:]))
    up = tensors["kv_b_proj.weight"].unflatten(0, (heads, -1))
    made["kv_b_proj.weight"] = torch.cat((up, up.new_zeros(heads, zeros, rank)), dim=1).flatten(0, 1)
    out = tensors["o_proj.weight"].unflatten(1, (heads, -1))
    made["o_proj.weight"] = torch.cat((out, out.new_zeros(len(out), heads, zeros)), dim=2).flatten(1)
    weight = torch.full((rank,), norm_weight(s, eps), dtype=torch.float64)
    made["kv_a_layernorm.weight"] = cast("kv_a_layernorm.weight", weight, up.dtype)
    return made


def refusal(config: Any) -> str | None:
    """Why the served class cannot hold a checkpoint with the MLA configuration `config`; None where it can."""
    layers = range(config.num_hidden_layers)
    ranks = sorted({config.latent_rank(index) for index in layers})
    ropes = sorted({2 * len(config.layer_frequencies(index)) for index in layers})
    reasons = {
        "kv_b_proj reads the rotary key beside the latent (convert with --profile portable)": (
            config.rope_in_latent
        ),
        f"layers differ in kv_lora_rank {ranks} or qk_rope_head_dim {ropes} (convert with --profile portable)": (
            len(ranks) > 1 or len(ropes) > 1
        ),
        "qk_nope_head_dim is not head_dim in every layer (convert with --profile portable)": any(
            config.nope_width(index) != config.v_head_dim for index in layers
        ),
        "its keys are divided by their RMS, which is cached beside latent and rotary key": (
            config.qk_norm is not None
        ),
        f"its scores pass through a softcap of {config.attention_softcap}, which engines leave out": (
            config.attention_softcap is not None
        ),
        f"a window of {config.layer_window(0)} tokens, which engines leave out": any(
            config.layer_window(index) for index in layers
        ),
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def served_config(config: Any, eps: float, pad_row: int | None = None) -> Any:
    """The served configuration of a converted checkpoint with the MLA configuration `config`.

    Args:
        eps: of the latent's norm.
        pad_row: elements of a cached row that the latent is widened to with zeros; None: as it is.
    Raises:
        ExportError: with the reason where the class cannot hold it.
    """
    reason = refusal(config)
    if reason is not None:
        raise ExportError(f"own cannot hold this checkpoint: {reason}")
    values = class_free_values(config)
    for name in ("rope_in_latent", "attention_softcap", "qk_norm"):
        values.pop(name)
    nope, rope = config.nope_width(0), 2 * len(config.layer_frequencies(0))
    rank = padded_rank(config.latent_rank(0), rope, pad_row)
    values |= {
        "head_dim": rank + rope,  # by which vLLM sizes the cache of a class that it does not know
        "kv_lora_rank": rank,
        "qk_rope_head_dim": rope,
        "v_head_dim": padded_value(nope, rope, config.v_head_dim),
        "latent_norm_eps": eps,
        "softmax_scale": config.softmax_scale or config.head_dim**-0.5,
    }
    return model_class(config).config_class(**values)


def model_class(config: Any) -> Any:
    """The served class for the donor of `config`, an MLA or a served configuration."""
    donor_config = getattr(transformers, type(config).__name__.removeprefix("MLA").removeprefix("Served"))
    return served_class(donor_config)
