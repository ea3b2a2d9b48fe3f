"""Checks of a donor's configuration: why a method does not apply to it. Every reason names the feature."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from mhconvert.errors import UnsupportedError

from ..families.facts import Family, attention_facts, family_of, layer_window, rope_settings, rotary_share
from . import registry

# Types that scale each frequency by a constant; "dynamic" and "longrope" change with the length of the text.
FIXED_ROPE_TYPES = ("default", "linear", "llama3", "yarn")

STOCK_BLOCKS = (
    "llama",
    "mistral",
    "ministral",
)  # whose blocks, apart from the attention, are those of stock latent-attention classes
QUANTISED = {"awq": "AWQ", "gptq": "GPTQ", "fp8": "FP8", "bitsandbytes": "bitsandbytes", "gguf": "GGUF"}
PART_CONFIGS = ("vision_config", "audio_config", "text_config", "thinker_config", "speech_config")
# Fields of norms that are no RMSNorm before RoPE: a LayerNorm, or a norm after it.
QK_NORM_FIELDS = ("use_qk_norm", "qk_norm", "qk_layernorm")
# Fields of attention that is no causal softmax over products of linear queries and keys.
OTHER_FIELDS = ("clip_qkv", "use_bidirectional_attention")


def refusals(config: Any) -> dict[str, str | None]:
    """For each method: None where it applies to a donor with `config`, else the reason why not."""
    return {name: refusal(config, registry.info(name).checks) for name in registry.METHOD_NAMES}


def require(config: Any, method: str) -> Family:
    """The family of `config`, to which `method` applies. Raises UnsupportedError with the reason where it does not."""
    reason = refusal(config, registry.info(method).checks)
    if reason is not None:
        raise UnsupportedError(f"{method} cannot convert this donor: {reason}")
    return family_of(config)


def refusal(config: Any, checks: Iterable[str]) -> str | None:
    """The reason of the first check, by its name in CHECKS, that `config` does not pass; None where it passes all."""
    reasons = (CHECKS[name](config) for name in checks)
    return next((reason for reason in reasons if reason), None)


def served_refusal(config: Any) -> str | None:
    """Why serving engines would not cache a converted donor of `config` as a latent; None where they would."""
    facts = attention_facts(config)
    reasons = {
        f"its keys have a norm ({facts.qk_norm}), whose RMS would have to be cached too": facts.qk_norm
        is not None,
        f"its scores have a softcap of {facts.softcap}": facts.softcap is not None,
        f"sliding_window={getattr(config, 'sliding_window', None)}": any(
            layer_window(config, index) for index in range(config.num_hidden_layers)
        ),
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def _multimodal(config: Any) -> str | None:
    part = next((p for p in PART_CONFIGS if getattr(config, p, None) is not None), None)
    return part and f"it is multimodal ({part}); only text decoders are supported"


def _not_causal(config: Any) -> str | None:
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
        "convert that, and quantise the result (where they are plain all the same, give its downloaded folder)"
    )


def _qk_norm_kind(config: Any) -> str | None:
    name = next((n for n in QK_NORM_FIELDS if getattr(config, n, False) is True), None)
    return name and f"{name}=True: this norm of queries and keys is not supported"


def _attention_kind(config: Any) -> str | None:
    name = next((n for n in OTHER_FIELDS if getattr(config, n, None)), None)
    return family_of(config).refused or (name and f"{name}={getattr(config, name)} is not supported")


def _head_counts(config: Any) -> str | None:
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


def _own_windows(config: Any) -> str | None:
    at = next((i for i in range(config.num_hidden_layers) if layer_window(config, i)), None)
    return None if at is None else f"its layer {at} has a window of {layer_window(config, at)} tokens"


def _rope(config: Any) -> str | None:
    for rope in rope_settings(config):
        kind = rope.get("rope_type", "default")
        if kind not in FIXED_ROPE_TYPES:
            return f"rope_type '{kind}' is not supported; supported are {', '.join(FIXED_ROPE_TYPES)}"
    share = rotary_share(config)
    if share != 1 and not family_of(config).partial_rotary:
        return f"partial_rotary_factor={share}: {config.model_type} models turn whole heads"
    head_dim, turned = attention_facts(config).head_dim, attention_facts(config).rotary_dim
    if turned < 2 or turned % 2 or head_dim % 2:
        return f"RoPE turns {turned} of a head's {head_dim} elements; both must be even"
    return None


CHECKS: dict[str, Callable[[Any], str | None]] = {
    "multimodal": _multimodal,
    "not_causal": _not_causal,
    "unknown_family": _unknown_family,
    "quantised": _quantised,
    "head_counts": _head_counts,
    "qk_norm_kind": _qk_norm_kind,
    "attention_kind": _attention_kind,
    "window": _window,
    "rope": _rope,
    "own_windows": _own_windows,
}
