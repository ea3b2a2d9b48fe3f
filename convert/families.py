"""Donor facts as data: the model families that are known, and what stands in the way of a method."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mhconvert.convert.errors import UnsupportedError


@dataclass(frozen=True)
class Family:
    """Where one family keeps its parts; names are those of its transformers modules.

    attention_norm: the decoder layer's attribute whose output feeds `self_attn`.
    base: the attribute of the causal model that holds layers, embedding and final norm.
    """

    model_type: str
    attention_norm: str = "input_layernorm"
    base: str = "model"
    layers: str = "layers"
    embedding: str = "embed_tokens"
    final_norm: str = "norm"
    rotary: str = "rotary_emb"


FAMILIES: dict[str, Family] = {row.model_type: row for row in (Family("llama"), Family("mistral"))}

# These scale each frequency by a constant. "dynamic" and "longrope" change with the length of the text.
FIXED_ROPE_TYPES = ("default", "linear", "llama3", "yarn")

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


def _bias(config: Any) -> str | None:
    names = ("attention_bias", "qkv_bias", "mlp_bias")
    name = next((n for n in names if getattr(config, n, False)), None)
    return name and f"{name}=True: projections with biases are not supported yet"


def _qk_norm(config: Any) -> str | None:
    name = next((n for n in ("use_qk_norm", "qk_norm", "qk_layernorm") if getattr(config, n, False)), None)
    return name and f"{name}=True: QK-norm is not supported yet"


def _heads(config: Any) -> str | None:
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    bad = groups < 1 or heads % groups
    return f"num_attention_heads={heads} is no multiple of num_key_value_heads={groups}" if bad else None


def _window(config: Any) -> str | None:
    window = getattr(config, "sliding_window", None)
    if window:
        return f"sliding_window={window}: windowed attention is not supported"
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"]) - {"full_attention"}
    return f"layer_types has '{min(kinds)}': only full attention is supported" if kinds else None


def _rope(config: Any) -> str | None:
    rope = getattr(config, "rope_parameters", None) or {}
    kind = rope.get("rope_type", "default")
    if kind not in FIXED_ROPE_TYPES:
        return f"rope_type '{kind}' is not supported; supported are {', '.join(FIXED_ROPE_TYPES)}"
    share = rope.get("partial_rotary_factor") or getattr(config, "partial_rotary_factor", None) or 1.0
    return (
        f"partial_rotary_factor={share}: only RoPE over the whole head is supported" if share != 1 else None
    )


Check = Callable[[Any], str | None]
MODEL_CHECKS: tuple[Check, ...] = (_multimodal, _encoder, _unknown_family, _quantised)
ATTENTION_CHECKS: tuple[Check, ...] = (_heads, _bias, _qk_norm, _window, _rope)
