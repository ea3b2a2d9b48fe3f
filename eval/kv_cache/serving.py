"""Models that are measured with a quantised cache: which may have one, and every forward pass with a fresh one."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, get_args

import torch
from transformers.cache_utils import Cache

from mhconvert.errors import MhconvertError

from ...convert.families.facts import layer_window
from ...convert.open_model import OpenModel
from ..settings import OWN_CACHE, KvCacheDtype
from .codes import GROUP
from .formats import ByChannel, ByToken, Format, Fp8
from .group_pass import in_groups
from .layer import CodedLayer

# Tokens behind which no key waits for its group: what is weighed is the rate of the codes.
WHOLE_GROUPS = 2 * GROUP
KINDS = ("full_attention", "sliding_attention")  # of layers that cache the keys and values of tokens


def require(opened: OpenModel, dtype: str) -> None:
    """Raises MhconvertError where the model's cache cannot have `dtype`; before any weight is read."""
    if dtype == OWN_CACHE:
        return
    if dtype not in get_args(KvCacheDtype):
        raise MhconvertError(f"kv_cache_dtype '{dtype}' is not one of {', '.join(get_args(KvCacheDtype))}")
    text = opened.config.get_text_config()
    if getattr(text, "kv_code_counts", None) is not None:
        raise MhconvertError(
            f"{opened.reference} caches codes already (kv_bits), not keys and values, so --kv-cache-dtype {dtype} has "
            "nothing to code; leave it out"
        )
    if any(getattr(text, "kv_windows", None) or ()):
        raise MhconvertError(
            f"{opened.reference} has layers whose cache keeps the first tokens and a window alone (kv_windows), which "
            f"--kv-cache-dtype {dtype} does not code; leave it out"
        )
    for kind in getattr(text, "layer_types", None) or ():
        if kind not in KINDS:
            raise MhconvertError(
                f"{opened.reference} has layers of the kind {kind}, whose cache --kv-cache-dtype {dtype} does not "
                f"code; it codes {' and '.join(KINDS)}"
            )
    if dtype == "fp8" and torch.device(opened.device).type == "mps":
        raise MhconvertError("torch has no float8 on mps; choose --kv-cache-dtype int8, or --device cpu")


def make_cache(config: Any, dtype: str) -> Cache:
    """An empty cache for a model with `config`, with a layer of codes for each of the model's layers."""
    text = config.get_text_config()
    layers: list[Any] = []
    for index in range(text.num_hidden_layers):
        layers.append(CodedLayer(*_formats(text, dtype), layer_window(text, index)))
    return Cache(layers=layers)


def _formats(text: Any, dtype: str) -> tuple[Format, Format]:
    """Of what the model caches as its keys and as its values.

    Latent attention (mla) caches a latent and a rotary key instead. The components of both differ in size as
    the channels of keys do, so both are coded by channel.
    """
    if dtype == "fp8":
        return Fp8(), Fp8()
    bits = int(dtype.removeprefix("int"))
    latent = str(text.model_type).startswith("mla_")
    return ByChannel(bits), ByChannel(bits) if latent else ByToken(bits)


def serve(model: Any, dtype: str) -> Any:
    """`model`, which reads and writes a cache of `dtype` from now on, in `generate` and in every forward pass.

    A forward pass without a cache gets a fresh one, so that what is evaluated is what is served.
    """
    if dtype == OWN_CACHE:
        return model
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    generate = base.generate

    @functools.wraps(generate)
    def cached_generate(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("past_key_values") is None:
            kwargs["past_key_values"] = make_cache(base.config, dtype)
        return generate(*args, **kwargs)

    # On the instance: peft and lm-eval call these by name, past the hooks of modules.
    base.forward, base.generate = cached_forward(base, dtype), cached_generate
    return model


def cached_forward(model: Any, dtype: str) -> Callable[..., Any]:
    """`model.forward` with a cache of `dtype`, a fresh one where the call brings none."""
    forward, parameters = model.forward, list(inspect.signature(model.forward).parameters)

    @functools.wraps(forward)
    def cached(*args: Any, **kwargs: Any) -> Any:
        kwargs |= dict(zip(parameters, args, strict=False))
        if kwargs.get("past_key_values") is None:
            kwargs |= {"past_key_values": make_cache(model.config, dtype), "use_cache": True}
        return forward(**kwargs) if dtype == "fp8" else in_groups(forward, kwargs)  # fp8 has no groups

    return cached
