"""A portable MLA checkpoint as configuration and tensors of a stock class: dense DeepSeek-V3, or Youtu.

`plan` refuses what the class would drop, from the configuration alone; `to_deepseek_v3` writes the folder.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mhconvert.errors import ExportError

from ...methods.refusals import STOCK_BLOCKS
from ...storage.dtype_cast import cast
from ...storage.safetensors_reader import SafetensorsSource
from ..engine_support import padded_value
from .deepseek_layer import (
    EPS,
    Fold,
    LatentShape,
    dense_attention,
    fold,
    of_a_row,
    series_order,
    series_theta,
)
from .padded_row import padded, padded_rank

CLASSES = {"deepseek_v3": "DeepseekV3ForCausalLM", "youtu": "YoutuForCausalLM"}
ROPE_TYPES = {"deepseek_v3": ("default",), "youtu": ("default", "linear", "llama3")}
SMALLEST = torch.finfo(torch.bfloat16).tiny  # what a dtype of the weights must hold: float16 does not
PLAIN = {  # config keys that mean the same in the donor's class and in these
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("hidden_act", "max_position_embeddings", "initializer_range", "use_cache", "attention_dropout"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "rope_parameters"),
}


@dataclass(frozen=True)
class Plan:
    """What will be written.

    Attributes:
        to: "deepseek_v3" or "youtu".
        config: of the stock class.
        shape: widths of the attention.
        orders: for each layer, the order of its rotary components.
        dtype: of the weights.
    """

    to: str
    config: Any
    shape: LatentShape
    orders: list[list[int]]
    dtype: torch.dtype

    @property
    def elements_per_token(self) -> int:
        """Cache elements per token, all layers together."""
        return (self.shape.kv_lora_rank + self.shape.qk_rope_head_dim) * self.config.num_hidden_layers


def refusal(config: Any, to: str) -> str | None:
    """The feature of the checkpoint that the class `to` does not have; None where it has all."""
    rope = config.rope_parameters or {}
    kind = rope.get("rope_type", "default") if isinstance(rope, dict) else "default"
    family = config.model_type.removeprefix("mla_")
    reasons = {
        f"{family} blocks are not Llama's, whose norms and MLP the class has": family not in STOCK_BLOCKS,
        "kv_lora_rank differs from layer to layer, and the class has one (convert with --profile portable)": (
            isinstance(config.kv_lora_rank, list)
        ),
        "qk_nope_head_dim is not head_dim in every layer (convert with --profile portable)": any(
            config.nope_width(index) != config.v_head_dim for index in range(config.num_hidden_layers)
        ),
        "kv_b_proj reads the rotary key too (convert with --profile portable)": config.rope_in_latent,
        "o_proj has a bias, which the class would drop": config.attention_output_bias,
        "q_proj and kv_a_proj_with_mqa have biases, which the class would drop": config.attention_input_bias,
        f"qk_norm={config.qk_norm}, which the class does not have": config.qk_norm is not None,
        f"attention_softcap={config.attention_softcap}, which the class does not have": config.attention_softcap
        is not None,
        "the MLP has biases, which the class would drop": bool(getattr(config, "mlp_bias", False)),
        f"hidden_act={config.hidden_act}, and engines take silu alone": config.hidden_act != "silu",
        f"a window of {config.layer_window(0)} tokens, which the class does not have": any(
            config.layer_window(index) for index in range(config.num_hidden_layers)
        ),
        f"rope_type {kind}, whose frequencies engines would compute otherwise": kind not in ROPE_TYPES[to],
    }
    return next((reason for reason, holds in reasons.items() if holds), None) or _rotary_refusal(config)


def _rotary_refusal(config: Any) -> str | None:
    """The feature of the checkpoint's RoPE that the stock classes do not have; None where they have all."""
    if (config.rope_parameters or {}).get("partial_rotary_factor", 1.0) != 1.0:
        return "RoPE turns a part of a head alone, which the class does not do"
    series = set()
    for index in range(config.num_hidden_layers):
        step_and_order = series_order(config.layer_frequencies(index))
        if step_and_order is None:
            return (
                f"layer {index} turns with frequencies that are no geometric series, and the class computes one "
                "(convert with --profile portable)"
            )
        step, order = step_and_order
        series.add((step, len(order)))
    if len(series) > 1:
        return "its layers turn with different frequencies, and the class has one series (--profile portable)"
    return None


def plan(
    config: Any, to: str, dtype: torch.dtype, pad_values: bool = True, pad_row: int | None = None
) -> Plan:
    """The stock configuration and shapes of a converted checkpoint with the MLA configuration `config`.

    Args:
        config: of the checkpoint.
        to: a key of CLASSES.
        dtype: of the weights to write.
        pad_values: whether values are padded to a width that kernels take.
        pad_row: elements of a cached row that the latent is widened to with zeros; None: as it is.

    Raises:
        ExportError: naming the feature that would be lost.
    """
    reason = refusal(config, to)
    if reason is not None:
        raise ExportError(f"{to} cannot hold this checkpoint: {reason}")
    if torch.finfo(dtype).tiny > SMALLEST:
        raise ExportError(
            f"{str(dtype).removeprefix('torch.')} holds no numbers as small as the latent's norm needs; use "
            "--dtype bfloat16 or float32"
        )
    series = [series_order(config.layer_frequencies(index)) for index in range(config.num_hidden_layers)]
    orders, step = [each[1] for each in series if each], next(each[0] for each in series if each)
    nope, rope, value = config.nope_width(0), 2 * len(orders[0]), config.v_head_dim
    wide = padded_value(nope, rope, value) if pad_values else value
    rank = padded_rank(config.kv_lora_rank, rope, pad_row)
    shape = LatentShape(config.num_attention_heads, rank, nope, rope, value, wide)
    theta = series_theta(config.rope_parameters["rope_theta"], step, rope, config.head_dim)
    return Plan(to, _stock_config(config, to, shape, theta, dtype), shape, orders, dtype)


def _stock_config(config: Any, to: str, shape: LatentShape, theta: float, dtype: torch.dtype) -> Any:
    """The configuration of the class `to`.

    Args:
        config: of the checkpoint.
        to: a key of CLASSES.
        shape: widths of the attention.
        theta: rope_theta of the class, whose series the rotary components are turned by.
        dtype: of the weights to write.
    """
    from transformers import AutoConfig

    kept = {name: value for name, value in config.to_dict().items() if name in PLAIN}
    kept["rope_parameters"] = kept["rope_parameters"] | {"rope_theta": theta}
    if to == "youtu":
        kept |= of_a_row(kept["rope_parameters"], shape)
    widths = {
        "kv_lora_rank": shape.kv_lora_rank,
        "q_lora_rank": None,
        "qk_nope_head_dim": shape.qk_nope_head_dim,
        "qk_rope_head_dim": shape.qk_rope_head_dim,
        "v_head_dim": shape.padded_v_head_dim,
        "num_key_value_heads": shape.num_heads,
    }
    norms = {
        "rms_norm_eps": EPS,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "rope_interleave": True,
    }
    experts = {  # none of them: every layer is dense; engines read the numbers all the same
        "first_k_dense_replace": config.num_hidden_layers,
        "n_routed_experts": 1,
        "n_shared_experts": 1,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": config.intermediate_size,
        "n_group": 1,
        "topk_group": 1,
        "routed_scaling_factor": 1.0,
        "num_nextn_predict_layers": 0,
    }
    stock = AutoConfig.for_model(to, **kept, **widths, **norms, **(experts if to == "deepseek_v3" else {}))
    stock.architectures = [CLASSES[to]]
    stock.dtype = dtype
    return stock


def write_config(plan: Plan, folder: Path) -> None:
    """Write config.json with every key, since some engines do not know the class's defaults.

    RoPE is stated twice where it is plain: as transformers 5 reads it, and as MLX does, which assumes 10000 otherwise.
    """
    content = plan.config.to_dict()
    if plan.to == "deepseek_v3":
        content |= {"rope_theta": content["rope_parameters"]["rope_theta"], "rope_scaling": None}
    content["dtype"] = content["torch_dtype"] = str(plan.dtype).removeprefix("torch.")
    (folder / "config.json").write_text(
        json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8"
    )


def tensors(
    plan: Plan, source: SafetensorsSource, config: Any, largest_mean_squares: list[float]
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the stock checkpoint in plan.dtype, one layer in memory at a time.

    Args:
        plan: of the export.
        source: the checkpoint's tensors.
        config: the checkpoint's.
        largest_mean_squares: for each layer, of the worst token's latent.
    """
    names = source.names()
    residual = layer_fold(plan, config, 1.0).residual
    embedding = source.read("model.embed_tokens.weight")
    head = source.read("lm_head.weight") if "lm_head.weight" in names else embedding
    yield "model.embed_tokens.weight", cast("embed_tokens", embedding.double() * residual, plan.dtype)
    yield "lm_head.weight", cast("lm_head", head, plan.dtype)
    yield "model.norm.weight", cast("norm", source.read("model.norm.weight"), plan.dtype)
    for index, largest in enumerate(largest_mean_squares):
        prefix = f"model.layers.{index}."
        own = {name.removeprefix(prefix): source.read(name) for name in names if name.startswith(prefix)}
        attention = {
            name.removeprefix("self_attn."): value
            for name, value in own.items()
            if name.startswith("self_attn.")
        }
        factors = layer_fold(plan, config, largest)
        attention = padded(attention, config.kv_lora_rank, plan.shape.kv_lora_rank)
        made = dense_attention(attention, plan.shape, factors, plan.orders[index])
        rest = {name: value for name, value in own.items() if not name.startswith("self_attn.")}
        rest["mlp.down_proj.weight"] = rest["mlp.down_proj.weight"].double() * residual
        for name, value in (rest | {f"self_attn.{name}": value for name, value in made.items()}).items():
            yield prefix + name, cast(prefix + name, value, plan.dtype)


def layer_fold(plan: Plan, config: Any, largest_mean_square: float) -> Fold:
    """The factors that are folded into one layer."""
    scale = config.softmax_scale or config.head_dim**-0.5
    return fold(largest_mean_square, scale, plan.shape, config.rms_norm_eps, plan.dtype)
