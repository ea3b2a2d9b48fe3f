"""Donor facts as data: the model families that are known, and what stands in the way of a method."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mhconvert.convert.errors import UnsupportedError


@dataclass(frozen=True)
class Family:
    """Where one family keeps its parts and what its attention can do; names are those of its transformers modules.

    attention_norm: the decoder layer's attribute whose output feeds `self_attn`; None: it reads the block's input.
    input_bias, output_bias: whether q, k, v and o have biases, or the config's field that says so.
    qk_norm: "head" or "width", over what queries and keys are divided by their RMS. softcap: the config's field.
    window, partial_rotary: whether its attention honours `sliding_window` and `partial_rotary_factor`.
    base: the attribute of the causal model that holds layers, embedding and final norm.
    """

    model_type: str
    attention_norm: str | None = "input_layernorm"
    input_bias: bool | str = False
    output_bias: bool | str = False
    qk_norm: str | None = None
    softcap: str | None = None
    window: bool = False
    partial_rotary: bool = False
    base: str = "model"
    layers: str = "layers"
    embedding: str = "embed_tokens"
    final_norm: str = "norm"
    rotary: str = "rotary_emb"


BIASES = {"input_bias": "attention_bias", "output_bias": "attention_bias"}
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
        Family("phi3", window=True, partial_rotary=True),
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
    )
}


@dataclass(frozen=True)
class AttentionFacts:
    """A donor's attention in numbers.

    rotary_dim: how many of a head's head_dim elements RoPE turns. scale: what scores are multiplied by before the
    softmax; softcap: c where they then pass through c · tanh(score / c). norm_eps: of the QK-norm.
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
    def key_scales(self) -> int:
        """Numbers 1 / RMS that a token's keys have: one a KV head, one, or none."""
        return {None: 0, "head": self.kv_heads, "width": 1}[self.qk_norm]


def attention_facts(config: Any) -> AttentionFacts:
    """The facts of a donor of a known family; the same for all its layers."""
    family = family_of(config)
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return AttentionFacts(
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=head_dim,
        rotary_dim=int(head_dim * _rotary_share(config)),
        scale=_softmax_scale(config, head_dim),
        softcap=getattr(config, family.softcap) if family.softcap else None,
        input_bias=_stated(config, family.input_bias),
        output_bias=_stated(config, family.output_bias),
        qk_norm=family.qk_norm,
    )


def layer_window(config: Any, index: int) -> int | None:
    """How many tokens, itself included, a query of layer `index` sees; None: all before it."""
    kinds = getattr(config, "layer_types", None)
    if kinds is not None and kinds[index] != "sliding_attention":
        return None
    return getattr(config, "sliding_window", None) or None


def _stated(config: Any, field: bool | str) -> bool:
    return bool(getattr(config, field)) if isinstance(field, str) else field


def _softmax_scale(config: Any, head_dim: int) -> float:
    """Granite states the scale itself, Gemma 2 and 3 the width that it is the inverse root of."""
    scale = getattr(config, "attention_multiplier", None)
    return scale if scale is not None else (getattr(config, "query_pre_attn_scalar", None) or head_dim) ** -0.5


def _rotary_share(config: Any) -> float:
    return min(rope.get("partial_rotary_factor") or 1.0 for rope in rope_settings(config))


def rope_settings(config: Any) -> list[dict[str, Any]]:
    """The config's rope_parameters: one for all layers, or one for each type of layer."""
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [value for value in rope.values() if isinstance(value, dict)]
    return kinds or [rope]


# These scale each frequency by a constant. "dynamic" and "longrope" change with the length of the text.
FIXED_ROPE_TYPES = ("default", "linear", "llama3", "yarn")

STOCK_BLOCKS = ("llama", "mistral", "ministral")  # their blocks, but for the attention, are a stock class's
QUANTISED = {"awq": "AWQ", "gptq": "GPTQ", "fp8": "FP8", "bitsandbytes": "bitsandbytes", "gguf": "GGUF"}
PART_CONFIGS = ("vision_config", "audio_config", "text_config", "thinker_config", "speech_config")
NOT_YET = "not available in this version"


def family_of(config: Any) -> Family:
    """The family of `config`. Raises UnsupportedError naming its model_type and the supported ones."""
    model_type = getattr(config, "model_type", None)
    if model_type not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise UnsupportedError(f"model type '{model_type}' is not supported; the supported ones are {known}")
    return FAMILIES[model_type]


def refusals(config: Any) -> dict[str, str | None]:
    """For each method: None where it applies to `config`, else the reason why not."""
    return {"mla": _mla_refusal(config), "moh": NOT_YET, "dha": NOT_YET, "hydra": NOT_YET}


def require(config: Any, method: str) -> Family:
    """The family of `config`, to which `method` applies; otherwise UnsupportedError with the reason."""
    reason = refusals(config).get(method, f"method '{method}' is unknown")
    if reason is not None:
        raise UnsupportedError(f"{method} cannot convert this donor: {reason}")
    return family_of(config)


def stock_refusal(config: Any) -> str | None:
    """Why no stock latent-attention class holds a donor of `config`; None where one does."""
    facts, family = attention_facts(config), family_of(config)
    reasons = {
        f"{family.model_type} blocks are not Llama's": family.model_type not in STOCK_BLOCKS,
        "its attention has biases": facts.input_bias or facts.output_bias,
        f"sliding_window={getattr(config, 'sliding_window', None)}": any(
            layer_window(config, index) for index in range(config.num_hidden_layers)
        ),
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def _mla_refusal(config: Any) -> str | None:
    reasons = (check(config) for check in (*MODEL_CHECKS, *ATTENTION_CHECKS))
    return next((reason for reason in reasons if reason), None)


def _multimodal(config: Any) -> str | None:
    part = next((p for p in PART_CONFIGS if getattr(config, p, None) is not None), None)
    return part and f"it is multimodal ({part}); only text decoders are supported"


def _encoder(config: Any) -> str | None:
    if getattr(config, "is_encoder_decoder", False):
        return f"it is an encoder-decoder model ({config.model_type}); only decoders are supported"
    names = getattr(config, "architectures", None) or []
    if names and not any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in names):
        return f"its architecture {names[0]} is not a causal language model (…ForCausalLM)"
    return None


def _unknown_family(config: Any) -> str | None:
    try:
        family_of(config)
    except UnsupportedError as error:
        return str(error)
    return None


def _quantised(config: Any) -> str | None:
    settings = getattr(config, "quantization_config", None)
    if not settings:
        return None
    plain = settings if isinstance(settings, dict) else settings.to_dict()
    method = plain.get("quant_method") or ("bitsandbytes" if "load_in_4bit" in plain else "unknown")
    name = QUANTISED.get(str(method), str(method))
    return (
        f"its weights are quantised ({name}); use the plain (bf16 or fp16) donor it was made from, "
        "convert that, and quantise the result"
    )


def _qk_norm(config: Any) -> str | None:
    """Norms that are no RMS over a head or the width: LayerNorm, or a norm after RoPE."""
    name = next((n for n in ("use_qk_norm", "qk_norm", "qk_layernorm") if getattr(config, n, False)), None)
    return name and f"{name}=True: this norm of queries and keys is not supported"


def _other_attention(config: Any) -> str | None:
    """Features that keep the attention from being softmax over products of linear queries and keys."""
    for name in ("clip_qkv", "use_bidirectional_attention"):
        value = getattr(config, name, None)
        if value:
            return f"{name}={value} is not supported"
    return None


def _heads(config: Any) -> str | None:
    heads, groups = config.num_attention_heads, getattr(config, "num_key_value_heads", None)
    bad = groups is not None and (groups < 1 or heads % groups)
    return f"num_attention_heads={heads} is no multiple of num_key_value_heads={groups}" if bad else None


def _window(config: Any) -> str | None:
    kinds = set(getattr(config, "layer_types", None) or [])
    other = kinds - {"full_attention", "sliding_attention"}
    if other:
        return f"layer_types has '{min(other)}': only full and sliding attention are supported"
    window = getattr(config, "sliding_window", None)
    if (window or "sliding_attention" in kinds) and not family_of(config).window:
        return f"sliding_window={window}: {config.model_type} models have no windowed attention"
    return None


def _rope(config: Any) -> str | None:
    for rope in rope_settings(config):
        kind = rope.get("rope_type", "default")
        if kind not in FIXED_ROPE_TYPES:
            return f"rope_type '{kind}' is not supported; supported are {', '.join(FIXED_ROPE_TYPES)}"
    share = _rotary_share(config)
    if share != 1 and not family_of(config).partial_rotary:
        return f"partial_rotary_factor={share}: {config.model_type} models turn whole heads"
    head_dim, turned = attention_facts(config).head_dim, attention_facts(config).rotary_dim
    if turned < 2 or turned % 2 or head_dim % 2:
        return f"RoPE turns {turned} of a head's {head_dim} elements; both must be even"
    return None


Check = Callable[[Any], str | None]
MODEL_CHECKS: tuple[Check, ...] = (_multimodal, _encoder, _unknown_family, _quantised)
ATTENTION_CHECKS: tuple[Check, ...] = (_heads, _qk_norm, _other_attention, _window, _rope)
