"""The ranges of the numbers in a config, and the words of other fields: one table, which `config_check` asks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from .tensor_layout import STORED_DTYPES

LARGEST = 1e30  # its products with weights and activations stay far inside float32


@dataclass(frozen=True)
class Range:
    """Which numbers a field may have; null is left to the config's class, but for NEVER_NULL.

    Attributes:
        low, high: the bounds, which belong to it.
        above: whether `low` itself does not.
        whole: whether it is a count or an index.
        lists: whether the field may be a list of such numbers, or of lists of them.
    """

    low: float
    high: float = LARGEST
    above: bool = False
    whole: bool = False
    lists: bool = False

    def holds(self, value: Any) -> bool:
        """Whether `value` is a number in the range; a bool is none."""
        if isinstance(value, bool) or not isinstance(value, int if self.whole else int | float):
            return False
        return (self.low < value if self.above else self.low <= value) and value <= self.high

    @property
    def words(self) -> str:
        kind, low, high = "a number", f"{self.low:g}", f"{self.high:g}"
        if self.whole:
            kind, low, high = "a whole number", f"{self.low:,}", f"{self.high:,}"
        return f"{kind} above {low}, at most {high}" if self.above else f"{kind} from {low} to {high}"


def _whole(low: int, high: int, *, lists: bool = False) -> Range:
    return Range(low, high, whole=True, lists=lists)


POSITIVE = Range(0, above=True)
NOT_NEGATIVE = Range(0)
SHARE = Range(0, 1)
TOKEN = _whole(-1, (1 << 31) - 1)  # -1: none, in early configs
LENGTH = _whole(1, (1 << 31) - 1)
WIDTH = _whole(1, 1 << 20)
LAYERS = 4096  # several times the deepest model that is published

# By the names in config.json, also those of transformers 4 and of converted checkpoints. Bounds of sizes are far beyond
# every published model, and keep the number of elements of every tensor inside 64 bits.
RANGES: dict[str, Range] = {
    "vocab_size": _whole(1, 1 << 26),
    "hidden_size": WIDTH,
    "intermediate_size": _whole(1, 1 << 22),
    "moe_intermediate_size": _whole(1, 1 << 22),
    "shared_expert_intermediate_size": _whole(0, 1 << 22),
    "num_hidden_layers": _whole(1, LAYERS),
    "num_attention_heads": _whole(1, 1 << 14),
    "num_key_value_heads": _whole(1, 1 << 14),
    "head_dim": _whole(1, 1 << 16),
    "num_experts": _whole(0, 1 << 12),
    "num_local_experts": _whole(0, 1 << 12),
    "num_experts_per_tok": _whole(0, 1 << 12),
    "decoder_sparse_step": _whole(1, LAYERS),
    "mlp_only_layers": _whole(0, LAYERS, lists=True),
    "no_rope_layers": _whole(0, LAYERS, lists=True),
    "no_rope_layer_interval": _whole(1, LAYERS),
    "max_window_layers": _whole(0, LAYERS),
    "max_position_embeddings": LENGTH,
    "original_max_position_embeddings": LENGTH,
    "sliding_window": _whole(0, (1 << 31) - 1),  # 0: none
    "sliding_window_pattern": _whole(1, LAYERS),
    "_sliding_window_pattern": _whole(1, LAYERS),
    "rms_norm_eps": Range(0, 1, above=True),
    "layer_norm_eps": Range(0, 1, above=True),
    "norm_epsilon": Range(0, 1, above=True),
    "attn_logit_softcapping": POSITIVE,
    "final_logit_softcapping": POSITIVE,
    "query_pre_attn_scalar": POSITIVE,
    "attention_multiplier": POSITIVE,
    "embedding_multiplier": POSITIVE,
    "residual_multiplier": POSITIVE,
    "logits_scaling": POSITIVE,
    "logit_scale": POSITIVE,
    "clip_qkv": POSITIVE,
    "swiglu_alpha": POSITIVE,
    "swiglu_limit": POSITIVE,
    "initializer_range": NOT_NEGATIVE,
    "router_aux_loss_coef": NOT_NEGATIVE,
    "router_jitter_noise": NOT_NEGATIVE,
    **dict.fromkeys(("attention_dropout", "hidden_dropout", "embedding_dropout", "residual_dropout"), SHARE),
    **dict.fromkeys(("embd_pdrop", "resid_pdrop"), SHARE),
    "bos_token_id": TOKEN,
    "pad_token_id": TOKEN,
    "eos_token_id": Range(TOKEN.low, TOKEN.high, whole=True, lists=True),
    # RoPE, where transformers 4 and 5 have it
    "rope_theta": Range(1, above=True),
    "rope_local_base_freq": Range(1, above=True),
    "factor": POSITIVE,
    "beta_fast": POSITIVE,
    "beta_slow": POSITIVE,
    "low_freq_factor": POSITIVE,
    "high_freq_factor": POSITIVE,
    "attention_factor": POSITIVE,
    "mscale": NOT_NEGATIVE,
    "mscale_all_dim": NOT_NEGATIVE,
    "partial_rotary_factor": Range(0, 1, above=True),
    "short_factor": Range(0, above=True, lists=True),
    "long_factor": Range(0, above=True, lists=True),
    # converted checkpoints
    "kv_lora_rank": _whole(0, 1 << 20, lists=True),
    "qk_nope_head_dim": _whole(0, 1 << 20, lists=True),
    "qk_rope_head_dim": _whole(0, 1 << 20),
    "v_head_dim": WIDTH,
    "rope_frequencies": _whole(0, 1 << 16, lists=True),
    "kv_code_counts": _whole(0, 1 << 20, lists=True),
    "linear_layers": _whole(0, 1 << 14, lists=True),
    "linear_conv_kernel": _whole(1, 1 << 10),
    **dict.fromkeys(("k_head_map", "v_head_map", "k_fusion", "v_fusion"), _whole(0, 1 << 14, lists=True)),
    **dict.fromkeys(("shared_heads", "active_heads"), _whole(0, 1 << 14, lists=True)),
    **dict.fromkeys(("norm_scale", "norm_offset"), Range(-LARGEST, lists=True)),
    "softmax_scale": POSITIVE,
    "attention_softcap": POSITIVE,
}
PER_LAYER = (  # lists with an entry for each layer
    *("layer_types", "no_rope_layers", "kv_lora_rank", "qk_nope_head_dim", "rope_frequencies"),
    "kv_code_counts",
    *("k_head_map", "v_head_map", "shared_heads", "active_heads", "norm_scale", "norm_offset"),
)
ROPE = ("rope_parameters", "rope_scaling")  # mappings, or mappings of such by the type of layer
PARTS = ("text_config",)  # the others are of models that are refused by name
DTYPES = tuple(str(dtype).removeprefix("torch.") for dtype in STORED_DTYPES)
ROPE_TYPES = ("default", "su", "mrope", *ROPE_INIT_FUNCTIONS)  # the second and third in early configs
ROPE_WORDS = ("rope_type", "type")
NEVER_NULL = (
    "rope_theta",
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    *ROPE_WORDS,
)
WORDS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("dtype", "torch_dtype"), DTYPES),
    **dict.fromkeys(("hidden_act", "hidden_activation"), tuple(ACT2FN)),
    **dict.fromkeys(ROPE_WORDS, ROPE_TYPES),
}
