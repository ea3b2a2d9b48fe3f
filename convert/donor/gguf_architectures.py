"""The architectures of GGUF files as data: the model type that each is, and its conventions of storage.

Of llama.cpp's converters (conversion/*.py there): which rows they permute, what they add to norms, what they state.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

# Hyperparameter of a file -> field of the config, where the config's class has it. Not GGUF_CONFIG_MAPPING of
# transformers: it lacks gemma, mixtral, olmo, olmo2 and granite, and of the others head_dim (qwen3), softcaps, windows,
# RoPE scaling and partial rotation, so that defaults of the class would silently be another model's.
FIELDS: dict[str, str | None] = {
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.layer_norm_epsilon": "layer_norm_eps",
    "attention.clamp_kqv": "clip_qkv",
    "attention.scale": "attention_multiplier",
    "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier",
    "logit_scale": "logits_scaling",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
}
REQUIRED = ("context_length", "block_count", "embedding_length", "attention.head_count")
# Flag of the config -> the tensor whose presence it says.
FLAGS = {
    "attention_bias": "blk.0.attn_q.bias",
    "qkv_bias": "blk.0.attn_q.bias",
    "use_qkv_bias": "blk.0.attn_q.bias",
    "use_bias": "blk.0.attn_q.bias",
    "attention_out_bias": "blk.0.attn_output.bias",
    "mlp_bias": "blk.0.ffn_up.bias",
    "qk_layernorm": "blk.0.attn_q_norm.weight",
}


@dataclass(frozen=True)
class Architecture:
    """One architecture of llama.cpp.

    Attributes:
        name: as `general.architecture` states it.
        model_type: of transformers.
        needs: a hyperparameter that this row's files state; the first row that fits a file is its row.
        interleaved: whether the rows of q and k are in llama.cpp's interleaved RoPE order.
        norm_offset: the stored weight of a norm minus transformers'.
        fields: as FIELDS, and in place of it; None for what the class has as a constant.
        required: hyperparameters beside REQUIRED without which the model is not known.
        fixed: fields of the config that no file states.
        largest: how many layers the size has whose scores are not divided by √head_dim.
        renamed: part of a name in transformers -> in the names that gguf knows.
    """

    name: str
    model_type: str
    needs: str | None = None
    interleaved: bool = False
    norm_offset: float = 0.0
    fields: dict[str, str | None] = field(default_factory=dict)
    required: tuple[str, ...] = ("feed_forward_length",)
    fixed: dict[str, Any] = field(default_factory=dict)
    largest: int | None = None
    renamed: dict[str, str] = field(default_factory=dict)


_LOCAL_EXPERTS: dict[str, str | None] = {"expert_count": "num_local_experts"}
_WINDOW: dict[str, str | None] = {"attention.sliding_window": "sliding_window"}
_WINDOWED = ("feed_forward_length", "attention.sliding_window")
_EXPERTS = ("expert_count", "expert_used_count")
_MOE = (*_EXPERTS, "expert_feed_forward_length")

ARCHITECTURES = (
    # Mistral is a llama here: the same computation, and llama.cpp states no window.
    Architecture(
        "llama", "mixtral", needs="expert_count", interleaved=True, fields=_LOCAL_EXPERTS, required=_EXPERTS
    ),
    Architecture("llama", "llama", interleaved=True),
    Architecture("qwen2", "qwen2"),
    Architecture("qwen2moe", "qwen2_moe", required=_MOE),
    Architecture("qwen3", "qwen3"),
    Architecture("qwen3moe", "qwen3_moe", required=_MOE, fixed={"norm_topk_prob": True}),
    Architecture("gemma", "gemma", norm_offset=1.0),
    Architecture("gemma2", "gemma2", norm_offset=1.0, fields=_WINDOW, required=_WINDOWED, largest=46),
    Architecture("gemma3", "gemma3_text", norm_offset=1.0, fields=_WINDOW, required=_WINDOWED, largest=62),
    Architecture("phi3", "phi3", fields=_WINDOW),
    Architecture("olmo", "olmo", interleaved=True, fields={"attention.layer_norm_epsilon": None}),
    Architecture("olmo2", "olmo2"),
    Architecture("stablelm", "stablelm"),
    Architecture("starcoder2", "starcoder2", fields={"attention.layer_norm_epsilon": "norm_epsilon"}),
    Architecture("granite", "granite", interleaved=True),
)
