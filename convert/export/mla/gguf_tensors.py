"""A dense DeepSeek-V3 checkpoint as llama.cpp's deepseek2 architecture: refusals, names, shapes and tensors.

llama.cpp attends to the latent itself and so has kv_b_proj in two parts: attn_k_b (heads, kv_lora_rank,
qk_nope_head_dim), the key part transposed, and attn_v_b (heads, v_head_dim, kv_lora_rank).
Sources: llama.cpp, src/models/deepseek2.cpp (loader, graph) and conversion/deepseek.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mhconvert.errors import ExportError

from ...donor.config_check import require_ranges
from ...storage.safetensors_reader import SafetensorsSource, read_json

LATENT_EPS = 1e-6  # of the latent's norm in transformers; llama.cpp has one eps for all norms
IDENTITY_ERROR = 2.0**-14  # a norm that eps dominates differs from an identity by at most this, relatively
HALF_ROWS = 2.0**-16  # RMS of rows that half precision still represents to 2^-9
LARGEST_LIFT = 12  # keeps input_layernorm's output above 2^-14, below which half precision loses bits
HALF_LARGEST = 2.0**15
KEPT = ("attn_kv_a_mqa.weight",)  # stored in F32 whatever the file's kind, as every vector is


@dataclass(frozen=True)
class Shape:
    """Sizes of the model, by their names in config.json."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    max_position_embeddings: int


@dataclass(frozen=True)
class DenseCheckpoint:
    """A checkpoint that deepseek2 can hold.

    Attributes:
        tied: whether the embedding is the head too, so that there is no lm_head.
    """

    folder: Path
    shape: Shape
    rope_theta: float
    tied: bool
    source: SafetensorsSource


def open_dense(folder: Path) -> DenseCheckpoint:
    """The checkpoint in `folder`. Raises ExportError naming the feature that deepseek2 does not have."""
    config = read_json(folder / "config.json")
    require_ranges(config, folder / "config.json")
    reason = _refusal(config)
    if reason is not None:
        raise ExportError(f"{folder} cannot be a deepseek2 GGUF: {reason}")
    try:
        shape = Shape(**{name: int(config[name]) for name in Shape.__dataclass_fields__})
    except (KeyError, TypeError, ValueError) as error:
        raise ExportError(
            f"{folder / 'config.json'} lacks a size, or has none that is one: {error}"
        ) from error
    rope = config.get("rope_parameters") or {}
    theta = float(rope.get("rope_theta", config.get("rope_theta", 10000.0)))
    source = SafetensorsSource(folder)
    checkpoint = DenseCheckpoint(folder, shape, theta, bool(config.get("tie_word_embeddings")), source)
    _require_tensors(checkpoint)
    return checkpoint


def _refusal(config: dict[str, Any]) -> str | None:
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    layers, dense = config.get("num_hidden_layers", 0), config.get("first_k_dense_replace", 0)
    reasons = {
        f"its model_type is {config.get('model_type')}, not deepseek_v3 (export it to deepseek_v3 first)": (
            config.get("model_type") != "deepseek_v3"
        ),
        f"first_k_dense_replace={dense} of {layers} layers; the others are mixtures of experts": dense
        < layers,
        f"q_lora_rank={config.get('q_lora_rank')}; queries must come from one q_proj": (
            config.get("q_lora_rank") is not None
        ),
        "its attention has biases, which deepseek2 would drop": bool(config.get("attention_bias")),
        f"RoPE is scaled by '{kind}', which deepseek2 would lose": kind != "default",
        "RoPE turns a part of qk_rope_head_dim alone": rope.get("partial_rotary_factor", 1.0) != 1.0,
        "rope_interleave is false; deepseek2's rotary pairs lie side by side": not config.get(
            "rope_interleave", True
        ),
        f"rms_norm_eps={config.get('rms_norm_eps')}, and llama.cpp takes it for the latent's norm too, whose eps is "
        f"{LATENT_EPS}": config.get("rms_norm_eps", LATENT_EPS) != LATENT_EPS,
        f"hidden_act={config.get('hidden_act')}; deepseek2's is silu": config.get("hidden_act", "silu")
        != "silu",
        "its weights are quantised": config.get("quantization_config") is not None,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def _hub_shapes(shape: Shape, tied: bool) -> dict[str, tuple[int, ...]]:
    """The name and shape of every tensor in transformers."""
    hidden, wide, heads = shape.hidden_size, shape.intermediate_size, shape.num_attention_heads
    rank, rope = shape.kv_lora_rank, shape.qk_rope_head_dim
    nope, value = shape.qk_nope_head_dim, shape.v_head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (shape.vocab_size, hidden),
        "model.norm.weight": (hidden,),
    }
    if not tied:
        shapes["lm_head.weight"] = (shape.vocab_size, hidden)
    for index in range(shape.num_hidden_layers):
        layer = {
            "input_layernorm": (hidden,),
            "self_attn.q_proj": (heads * (nope + rope), hidden),
            "self_attn.kv_a_proj_with_mqa": (rank + rope, hidden),
            "self_attn.kv_a_layernorm": (rank,),
            "self_attn.kv_b_proj": (heads * (nope + value), rank),
            "self_attn.o_proj": (hidden, heads * value),
            "post_attention_layernorm": (hidden,),
            "mlp.gate_proj": (wide, hidden),
            "mlp.up_proj": (wide, hidden),
            "mlp.down_proj": (hidden, wide),
        }
        shapes |= {f"model.layers.{index}.{name}.weight": dims for name, dims in layer.items()}
    return shapes


def _require_tensors(checkpoint: DenseCheckpoint) -> None:
    source, expected = checkpoint.source, _hub_shapes(checkpoint.shape, checkpoint.tied)
    names = set(source.names()) - ({"lm_head.weight"} if checkpoint.tied else set())
    where = f"{checkpoint.folder} cannot be a deepseek2 GGUF"
    for name in sorted(names ^ set(expected)):
        kind = "a bias, " if name.endswith(".bias") else ""
        what = f"deepseek2 has no place for {kind}{name}" if name in names else f"it has no {name}"
        raise ExportError(f"{where}: {what}")
    for name, dims in expected.items():
        if source.shape(name) != dims:
            raise ExportError(
                f"{where}: {name} is {list(source.shape(name))}, not {list(dims)} as config.json has it"
            )
        if source.dtype(name) not in (torch.float32, torch.bfloat16, torch.float16):
            raise ExportError(
                f"{where}: {name} is {source.dtype(name)}; export from float32, bfloat16 or float16"
            )


def stored_shapes(checkpoint: DenseCheckpoint) -> dict[str, tuple[int, ...]]:
    """The name and shape of every tensor in llama.cpp, rows first, in the order of `tensors`."""
    shape = checkpoint.shape
    hidden, wide, heads = shape.hidden_size, shape.intermediate_size, shape.num_attention_heads
    rank, rope = shape.kv_lora_rank, shape.qk_rope_head_dim
    nope, value = shape.qk_nope_head_dim, shape.v_head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (shape.vocab_size, hidden),
        "output_norm.weight": (hidden,),
    }
    if not checkpoint.tied:
        shapes["output.weight"] = (shape.vocab_size, hidden)
    layer = {
        "attn_norm": (hidden,),
        "attn_q": (heads * (nope + rope), hidden),
        "attn_kv_a_mqa": (rank + rope, hidden),
        "attn_kv_a_norm": (rank,),
        "attn_k_b": (heads, rank, nope),
        "attn_v_b": (heads, value, rank),
        "attn_output": (hidden, heads * value),
        "ffn_norm": (hidden,),
        "ffn_gate": (wide, hidden),
        "ffn_up": (wide, hidden),
        "ffn_down": (hidden, wide),
    }
    for index in range(shape.num_hidden_layers):
        shapes |= {f"blk.{index}.{name}.weight": dims for name, dims in layer.items()}
    return shapes


def tensors(checkpoint: DenseCheckpoint) -> Iterator[tuple[str, Tensor]]:
    """Every tensor by its name in llama.cpp, in the order of `stored_shapes`, read one attention at a time."""
    shape, read = checkpoint.shape, checkpoint.source.read
    yield "token_embd.weight", read("model.embed_tokens.weight")
    yield "output_norm.weight", read("model.norm.weight")
    if not checkpoint.tied:
        yield "output.weight", read("lm_head.weight")
    for index in range(shape.num_hidden_layers):
        hub, ours = f"model.layers.{index}.", f"blk.{index}."
        norm, query, reads, latent_norm = balanced(
            read(f"{hub}input_layernorm.weight"),
            read(f"{hub}self_attn.q_proj.weight"),
            read(f"{hub}self_attn.kv_a_proj_with_mqa.weight"),
            read(f"{hub}self_attn.kv_a_layernorm.weight"),
        )
        yield f"{ours}attn_norm.weight", norm
        yield f"{ours}attn_q.weight", query
        yield f"{ours}attn_kv_a_mqa.weight", reads
        yield f"{ours}attn_kv_a_norm.weight", latent_norm
        up = read(f"{hub}self_attn.kv_b_proj.weight").unflatten(0, (shape.num_attention_heads, -1))
        yield f"{ours}attn_k_b.weight", up[:, : shape.qk_nope_head_dim].transpose(1, 2)  # H n r -> H r n
        yield f"{ours}attn_v_b.weight", up[:, shape.qk_nope_head_dim :]
        yield f"{ours}attn_output.weight", read(f"{hub}self_attn.o_proj.weight")
        yield f"{ours}ffn_norm.weight", read(f"{hub}post_attention_layernorm.weight")
        for part in ("gate", "up", "down"):
            yield f"{ours}ffn_{part}.weight", read(f"{hub}mlp.{part}_proj.weight")


def balanced(norm: Tensor, query: Tensor, reads: Tensor, latent_norm: Tensor) -> tuple[Tensor, ...]:
    """Tensors of the same function in float32, in which the latent's rows are as large as possible.

    Where eps outweighs the latent's mean square, its norm is an identity and its rows are so small that engines which
    multiply in half precision (llama.cpp's Metal backend, even with F32 weights) read zeros. So the rows take a factor
    from latent_norm, as far as IDENTITY_ERROR allows, and one from `norm`, which query and rotary rows take too. All
    factors are powers of two. A checkpoint whose latent has a real norm stays as it is.

    Args:
        norm: (D), input_layernorm.
        query: (H (n + p), D), q_proj.
        reads: (r + p, D), kv_a_proj_with_mqa.
        latent_norm: (r), kv_a_layernorm.
    Returns:
        The four tensors in that order.
    """
    norm, query, reads, latent_norm = (tensor.float() for tensor in (norm, query, reads, latent_norm))
    rank, width = len(latent_norm), len(norm)
    rows = reads[:rank].double()
    spread = rows * norm.double()
    # The norm's output has length ≤ sqrt(D), so no latent has a larger mean square than this.
    largest = width / rank * float(torch.linalg.eigvalsh(spread @ spread.T)[-1])
    if largest <= 0:
        return norm, query, reads, latent_norm
    spare = 2 * LATENT_EPS * IDENTITY_ERROR / largest
    gain = 2.0 ** max(0, math.floor(math.log2(spare) / 2))
    wanted = HALF_ROWS / (gain * float(rows.square().mean().sqrt()))
    room = HALF_LARGEST / max(float(query.abs().max()), float(reads[rank:].abs().max()), 1.0)
    lift = 2.0 ** max(0, min(math.ceil(math.log2(wanted)), math.floor(math.log2(room)), LARGEST_LIFT))
    grown = torch.cat((reads[:rank] * (gain * lift), reads[rank:] * lift))
    return norm / lift, query * lift, grown, latent_norm / gain
