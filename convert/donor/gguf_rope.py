"""The RoPE parameters of a GGUF model, from its metadata and its tensors of factors."""

from __future__ import annotations

from typing import Any

import torch

from mhconvert.errors import UnsupportedError

from .gguf_reader import GGUFHeader, dequantise

DIVISORS = "rope_freqs.weight"  # of the rotary frequencies
LONG, SHORT = (
    "rope_factors_long.weight",
    "rope_factors_short.weight",
)  # longrope's, beyond and within its context
ROPE_TENSORS = (DIVISORS, LONG, SHORT)  # read into the config, not as weights
BASE = 10000.0  # llama.cpp's, where a file states none
# Hyperparameter -> parameter of yarn, where the file states it.
YARN = {
    "rope.scaling.original_context_length": "original_max_position_embeddings",
    "rope.scaling.yarn_attn_factor": "attention_factor",
    "rope.scaling.yarn_beta_fast": "beta_fast",
    "rope.scaling.yarn_beta_slow": "beta_slow",
}
# Parameter -> the hyperparameter that states it, for messages.
ROPE_KEYS = {field: key for key, field in YARN.items()} | {
    "rope_theta": "rope.freq_base",
    "factor": "rope.scaling.factor",
}


def rope_parameters(header: GGUFHeader, head_dim: int) -> dict[str, Any]:
    """transformers' rope_parameters of the layers with full attention.

    Raises:
        UnsupportedError: the file does not state its scaling in full.
    """
    rope: dict[str, Any] = {
        "rope_type": "default",
        "rope_theta": float(header.hyperparameter("rope.freq_base", BASE)),
    }
    rotated = int(header.hyperparameter("rope.dimension_count", head_dim))
    if not 0 < rotated <= head_dim:
        raise ValueError(f"rope.dimension_count is {rotated}, and a head has {head_dim} elements")
    if rotated != head_dim:
        rope["partial_rotary_factor"] = rotated / head_dim
    scaling = header.hyperparameter("rope.scaling.type", "none")
    if LONG in header.tensors and SHORT in header.tensors:
        return rope | _longrope(header)
    if scaling == "linear":
        return rope | {"rope_type": "linear", "factor": float(header.hyperparameter("rope.scaling.factor"))}
    if scaling == "yarn":
        return rope | _yarn(header)
    if scaling != "none":
        raise _not_in_full(header, f"scales RoPE by '{scaling}'")
    if DIVISORS in header.tensors:
        rope |= _llama3(header, rope["rope_theta"], rotated)
    return rope


def _yarn(header: GGUFHeader) -> dict[str, Any]:
    factor = header.hyperparameter("rope.scaling.factor")
    stated = {field: header.hyperparameter(key) for key, field in YARN.items()}
    if factor is None or stated["original_max_position_embeddings"] is None:
        raise _not_in_full(header, "scales RoPE by 'yarn'")
    known = {field: value for field, value in stated.items() if value is not None}
    return {"rope_type": "yarn", "factor": float(factor)} | known


def _longrope(header: GGUFHeader) -> dict[str, Any]:
    original = header.hyperparameter("rope.scaling.original_context_length")
    if original is None:
        raise _not_in_full(header, "scales RoPE by 'longrope'")
    rope: dict[str, Any] = {
        "rope_type": "longrope",
        "short_factor": dequantise(header.tensors[SHORT]).tolist(),
        "long_factor": dequantise(header.tensors[LONG]).tolist(),
        "original_max_position_embeddings": int(original),
    }
    factor = header.hyperparameter("rope.scaling.attn_factor")
    return rope if factor is None else rope | {"attention_factor": float(factor)}


def _llama3(header: GGUFHeader, theta: float, rotated: int) -> dict[str, Any]:
    """The `llama3` RoPE parameters that reproduce the file's divisors of the rotary frequencies.

    Raises:
        UnsupportedError: no factor reproduces the divisors with Llama 3's other parameters.
    """
    divisors = dequantise(header.tensors[DIVISORS])
    known = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    factor = float(divisors.max())
    wavelengths = 2 * torch.pi * theta ** (torch.arange(0, rotated, 2, dtype=torch.float64) / rotated)
    smooth = ((8192 / wavelengths - 1.0) / 3.0).clamp(0, 1)
    expected = 1 / ((1 - smooth) / factor + smooth)
    if expected.shape != divisors.shape or not torch.allclose(expected, divisors.double(), rtol=1e-4):
        raise UnsupportedError(
            f"{header.path} carries RoPE factors ({DIVISORS}) other than Llama 3's; "
            "use the model's safetensors folder"
        )
    return {"rope_type": "llama3", "factor": factor, **known}


def _not_in_full(header: GGUFHeader, what: str) -> UnsupportedError:
    return UnsupportedError(
        f"{header.path} {what}, which it does not state in full; use the model's safetensors folder"
    )
