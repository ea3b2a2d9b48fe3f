"""The architectures of GGUF files as data: the model type that each is, and its conventions of storage.

Of llama.cpp's converters (conversion/*.py there): which rows they permute, what they add to norms, what they state.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

# Hyperparameter of a file -> field of the config, where the config's class has it. Not GGUF_CONFIG_MAPPING of
# transformers: it lacks gemma, mixtral, olmo, olmo2 and granite, and of the others head_dim (qwen3), softcaps, windows,
# RoPE scaling and partial rotation, so that defaults of the class would silently be another model's.
FIELDS: dict[str, str] = {
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.layer_norm_epsilon": "layer_norm_eps",
    "attention.sliding_window": "sliding_window",
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
# Flag of the config -> a tensor, and whether the flag says that the file has it.
FLAGS = {
    "attention_bias": ("blk.0.attn_q.bias", True),
    "qkv_bias": ("blk.0.attn_q.bias", True),
    "use_qkv_bias": ("blk.0.attn_q.bias", True),
    "use_bias": ("blk.0.attn_q.bias", True),
    "attention_out_bias": ("blk.0.attn_output.bias", True),
    "mlp_bias": ("blk.0.ffn_up.bias", True),
    "qk_layernorm": ("blk.0.attn_q_norm.weight", True),
    "use_parallel_residual": ("blk.0.ffn_norm.weight", False),
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
        fields: as FIELDS, and in place of it.
        required: hyperparameters beside REQUIRED without which the model is not known.
        fixed: fields of the config that no file states.
        largest: how many layers the size has whose scores are not divided by √head_dim.
        local_base: where windowed layers have RoPE of their own, unscaled: the hyperparameter of its base, its default.
        renamed: part of a name in transformers -> in the names that gguf knows.
    """

    name: str
    model_type: str
    needs: str | None = None
    interleaved: bool = False
    norm_offset: float = 0.0
    fields: dict[str, str] = field(default_factory=dict)
    required: tuple[str, ...] = ("feed_forward_length",)
    fixed: dict[str, Any] = field(default_factory=dict)
    largest: int | None = None
    local_base: tuple[str, float] | None = None
    renamed: dict[str, str] = field(default_factory=dict)


_WINDOW, _LENGTH, _SCALE = "attention.sliding_window", "feed_forward_length", "attention.scale"
_EXPERTS = ("expert_count", "expert_used_count")
_MOE = (*_EXPERTS, "expert_feed_forward_length")  # feed_forward_length is then of layers without experts
_LOCAL_EXPERTS: dict[str, str] = {"expert_count": "num_local_experts"}
_CONTEXT: dict[str, str] = {"rope.scaling.original_context_length": "original_max_position_embeddings"}
_GEMMA: dict[str, Any] = {"norm_offset": 1.0, "required": (_LENGTH, _WINDOW)}

ARCHITECTURES = (
    Architecture(
        "llama",
        "mixtral",
        "expert_count",
        interleaved=True,
        fields=_LOCAL_EXPERTS,
        required=(_LENGTH, *_EXPERTS),
    ),
    Architecture("llama", "llama", interleaved=True),  # Mistral too: llama.cpp states no window of it
    Architecture("qwen2", "qwen2"),
    Architecture("qwen2moe", "qwen2_moe", required=_MOE),
    Architecture("qwen3", "qwen3"),
    Architecture("qwen3moe", "qwen3_moe", required=_MOE, fixed={"norm_topk_prob": True}),
    Architecture("gemma", "gemma", norm_offset=1.0),
    Architecture("gemma2", "gemma2", **_GEMMA, largest=46),
    Architecture("gemma3", "gemma3_text", **_GEMMA, largest=62, local_base=("rope.freq_base_swa", 10000.0)),
    Architecture("phi3", "phi3", fields=_CONTEXT),
    Architecture("olmo", "olmo", interleaved=True),
    Architecture("olmo2", "olmo3", _WINDOW, local_base=("rope.freq_base", 10000.0)),
    Architecture("olmo2", "olmo2"),
    Architecture("olmoe", "olmoe", required=(_LENGTH, *_EXPERTS)),
    Architecture("stablelm", "stablelm"),
    Architecture("starcoder2", "starcoder2", fields={"attention.layer_norm_epsilon": "norm_epsilon"}),
    Architecture("granite", "granite", interleaved=True, required=(_LENGTH, _SCALE)),
    Architecture(
        "granitemoe",
        "granitemoe",
        interleaved=True,
        fields=_LOCAL_EXPERTS,
        required=(_LENGTH, *_EXPERTS, _SCALE),
        renamed={".block_sparse_moe.router": ".mlp.gate", ".block_sparse_moe.": ".mlp."},
    ),
    Architecture("arcee", "arcee", interleaved=True),
)
