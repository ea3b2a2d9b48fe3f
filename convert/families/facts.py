"""The supported model families as data, and the attention of a donor in numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mhconvert.errors import UnsupportedError


@dataclass(frozen=True)
class Family:
    """Where the modules of one model family are, and which features its attention has.

    Attributes:
        attention_norm: the decoder layer's attribute whose output feeds `self_attn`; None: it reads the block's input.
        input_bias, output_bias: whether q, k, v and whether o have biases, or the config's field that says so.
        qk_norm: whether queries and keys are divided by their RMS over each "head" or over the whole "width".
        softcap: the config's field with the softcap of the scores.
        window, partial_rotary: whether its attention honours `sliding_window` and `partial_rotary_factor`.
        fused_qkv: whether q, k and v are one matrix.
        base: the attribute of the causal model that holds the other parts.
        layers, embedding, final_norm, rotary: attributes of `base`.
        refused: what its attention has that no conversion rewrites; None: it is converted. Adapters take both kinds.
    """

    model_type: str
    attention_norm: str | None = "input_layernorm"
    input_bias: bool | str = False
    output_bias: bool | str = False
    qk_norm: str | None = None
    softcap: str | None = None
    window: bool = False
    partial_rotary: bool = False
    fused_qkv: bool = False
    base: str = "model"
    layers: str = "layers"
    embedding: str = "embed_tokens"
    final_norm: str = "norm"
    rotary: str = "rotary_emb"
    refused: str | None = None


BIASES: Any = {"input_bias": "attention_bias", "output_bias": "attention_bias"}
LONGEST_CONTEXT = 32768  # tokens for which a cache is counted unless more are asked for
PAIRS = "its RoPE turns neighbouring elements of a head together, and conversions rewrite a RoPE of halves"
NO_ROPE = "some of its layers have no RoPE, and a converted attention has one in every layer"
SINKS = "its softmax has learned sinks (self_attn.sinks), which a converted attention does not have"
FAMILIES: dict[str, Family] = {
    row.model_type: row
    for row in (
        Family("llama", **BIASES),
        Family("mistral", window=True),
        Family("ministral", window=True),
        Family("mixtral", window=True),
        Family("qwen2", input_bias=True, window=True),
        Family("qwen2_moe", input_bias="qkv_bias", window=True),
        Family("qwen3", **BIASES, qk_norm="head", window=True),
        Family("qwen3_moe", **BIASES, qk_norm="head", window=True),
        Family("gemma", **BIASES),
        Family("gemma2", **BIASES, softcap="attn_logit_softcapping", window=True),
        Family("gemma3_text", **BIASES, qk_norm="head", window=True),
        Family("phi3", window=True, partial_rotary=True, fused_qkv=True),
        Family("olmo", **BIASES),
        Family("olmo2", attention_norm=None, **BIASES, qk_norm="width"),
        Family("olmo3", attention_norm=None, **BIASES, qk_norm="width", window=True),
        Family("olmoe", **BIASES, qk_norm="width"),
        Family("granite", **BIASES),
        Family("granitemoe", **BIASES),
        Family("stablelm", input_bias="use_qkv_bias", partial_rotary=True),
        Family("starcoder2", input_bias="use_bias", output_bias="use_bias", window=True),
        Family("arcee", **BIASES),
        Family("seed_oss", input_bias="attention_bias", output_bias="attention_out_bias"),
        Family("smollm3", **BIASES, window=True, refused=NO_ROPE),
        Family("cohere", **BIASES, refused=PAIRS),
        Family("cohere2", **BIASES, window=True, refused=f"{PAIRS}; {NO_ROPE}"),
        Family("glm", input_bias="attention_bias", partial_rotary=True, refused=PAIRS),
        Family("glm4", input_bias="attention_bias", partial_rotary=True, refused=PAIRS),
        Family("ernie4_5", input_bias="use_bias", output_bias="use_bias", refused=PAIRS),
        Family("gpt_oss", **BIASES, window=True, refused=SINKS),
        Family("granite_swa", **BIASES, window=True, refused=SINKS),
        Family("cwm", window=True),
    )
}


def family_of(config: Any) -> Family:
    """The family of `config`. Raises UnsupportedError naming its model_type and the supported ones."""
    model_type = getattr(config, "model_type", None)
    if not type(config).__module__.startswith(
        "transformers."
    ):  # a converted model's class, made from its donor's
        kinds = (vars(kind).get("model_type") for kind in type(config).__mro__)
        model_type = next((kind for kind in kinds if kind in FAMILIES), model_type)
    if model_type not in FAMILIES:
        known = ", ".join(sorted(name for name, row in FAMILIES.items() if row.refused is None))
        raise UnsupportedError(f"model type '{model_type}' is not supported; the supported ones are {known}")
    return FAMILIES[model_type]


@dataclass(frozen=True)
class AttentionFacts:
    """A donor's attention in numbers.

    Attributes:
        heads, kv_heads: query heads H and KV heads G.
        head_dim: elements of a head, d.
        rotary_dim: how many of them RoPE rotates.
        scale: the factor of the scores before the softmax.
        softcap: c, where scores then pass through c · tanh(score / c).
        input_bias, output_bias: whether q, k, v and whether o have biases.
        qk_norm: as in `Family`.
    """

    heads: int
    kv_heads: int
    head_dim: int
    rotary_dim: int
    scale: float
    softcap: float | None
    input_bias: bool
    output_bias: bool
    qk_norm: str | None

    @property
    def head_map(self) -> list[int]:
        """(H), the KV head that each query head reads."""
        return [head // (self.heads // self.kv_heads) for head in range(self.heads)]

    @property
    def kv_elements(self) -> int:
        """Elements of a token's keys and values in one layer, 2 G d."""
        return 2 * self.kv_heads * self.head_dim

    @property
    def key_scales(self) -> int:
        """How many numbers 1 / RMS the keys of a token have: one per KV head, one, or none."""
        return {None: 0, "head": self.kv_heads, "width": 1}[self.qk_norm]


def attention_facts(config: Any) -> AttentionFacts:
    """The facts of a donor of a known family, which hold for all its layers. Raises UnsupportedError for another."""
    family = family_of(config)
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return AttentionFacts(
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=head_dim,
        rotary_dim=int(head_dim * rotary_share(config)),
        scale=_softmax_scale(config, head_dim),
        softcap=getattr(config, family.softcap) if family.softcap else None,
        input_bias=_stated(config, family.input_bias),
        output_bias=_stated(config, family.output_bias),
        qk_norm=family.qk_norm,
    )


def class_free_values(config: Any) -> dict[str, Any]:
    """The fields of `config` without those that name its class and its origin."""
    values: dict[str, Any] = config.to_dict()
    for key in ("model_type", "architectures", "transformers_version", "_name_or_path", "auto_map"):
        values.pop(key, None)
    return values


def layer_window(config: Any, index: int) -> int | None:
    """How many tokens, itself included, a query of layer `index` sees; None: all before it."""
    kinds = getattr(config, "layer_types", None)
    if kinds is not None and kinds[index] != "sliding_attention":
        return None
    return getattr(config, "sliding_window", None) or None


def counted_context(config: Any) -> int:
    """Tokens for which a cache behind windows is counted unless asked otherwise: what the model reads, or 32768."""
    return min(getattr(config, "max_position_embeddings", None) or LONGEST_CONTEXT, LONGEST_CONTEXT)


def cached_part(config: Any, index: int, context: int | None) -> float:
    """The part of a text of `context` tokens that layer `index` caches; 1 for a context of None."""
    window = layer_window(config, index)
    return min(window / context, 1.0) if context and window else 1.0


def _stated(config: Any, field: bool | str) -> bool:
    return bool(getattr(config, field)) if isinstance(field, str) else field


def _softmax_scale(config: Any, head_dim: int) -> float:
    """The scale of the scores: Granite states it, Gemma 2 and 3 state the width whose inverse root it is."""
    scale = getattr(config, "attention_multiplier", None)
    return (
        scale if scale is not None else (getattr(config, "query_pre_attn_scalar", None) or head_dim) ** -0.5
    )


def rotary_share(config: Any) -> float:
    """The share of a head's elements that RoPE rotates."""
    return min(rope.get("partial_rotary_factor") or 1.0 for rope in rope_settings(config))


def rope_settings(config: Any) -> list[dict[str, Any]]:
    """The config's rope_parameters: one for all layers, or one for each type of layer."""
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [value for value in rope.values() if isinstance(value, dict)]
    return kinds or [rope]
