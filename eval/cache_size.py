"""The size of a model's cache, measured on the cache object after generation, or filled to the length of a text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..convert.bare_process.child import cache_storage, filled_cache
from ..convert.checkpoint.provenance import recorded_context
from ..convert.families.facts import counted_context, layer_window
from ..convert.open_model import OpenModel
from .kv_cache.serving import WHOLE_GROUPS, make_cache
from .settings import OWN_CACHE

SHORT_PART = 8  # of a context is a short text


@dataclass(frozen=True)
class CacheCost:
    """A cache object after `generate` with batch size 1.

    Attributes:
        class_name: of the cache object.
        tokens: that it holds.
        bytes, elements: of its tensors' storage over all layers; two bytes of codes count as one element.
    """

    class_name: str
    tokens: int
    bytes: int
    elements: float

    @property
    def bytes_per_token(self) -> float:
        return self.bytes / self.tokens

    @property
    def elements_per_token(self) -> float:
        return self.elements / self.tokens


def lengths(opened: Sequence[OpenModel]) -> list[int]:
    """Tokens at which the caches of models are compared, a short text and the context; none where any number will do.

    The context is the longest that one of them was planned for; without one, and where a model has layers with
    windows or states, what plans count by default.
    """
    planned = [context for each in opened if (context := recorded_context(each.folder))]
    configs = [each.config.get_text_config() for each in opened]
    by_length = any(
        getattr(config, "kv_windows", None)
        or getattr(config, "linear_layers", None)
        or any(layer_window(config, index) for index in range(config.num_hidden_layers))
        for config in configs
    )
    if not planned and not by_length:
        return []
    context = max(planned, default=0) or counted_context(configs[0])
    return [*([context // SHORT_PART] if context >= SHORT_PART else []), context]


def elements_per_token(model: Any, at: Sequence[int], dtype: str = OWN_CACHE) -> list[float]:
    """Elements of the cache per token at each number of tokens in `at`; of none, as `measure_cache` finds it."""
    if not at:
        return [measure_cache(model, dtype=dtype).elements_per_token]
    with torch.inference_mode():
        sizes = filled_cache(model, _generated(model, 1, 1, dtype), at)
    return [elements / tokens for tokens, (_, elements) in zip(at, sizes, strict=True)]


def measure_cache(
    model: Any, *, prompt_tokens: int | None = None, new_tokens: int = 4, dtype: str = OWN_CACHE
) -> CacheCost:
    """The size of the cache that `generate` returns after an arbitrary prompt.

    The cache holds prompt_tokens + new_tokens − 1 tokens, as the last generated one is not read back. By default these
    are whole groups of a coded cache, whatever the `dtype`, as tokens behind a sliding window weigh nothing.
    """
    if prompt_tokens is None:
        prompt_tokens = WHOLE_GROUPS + 1 - new_tokens
    cache = _generated(model, prompt_tokens, new_tokens, dtype)
    size, elements = cache_storage(cache)
    return CacheCost(type(cache).__name__, int(cache.get_seq_length()), size, elements)


def _generated(model: Any, prompt_tokens: int, new_tokens: int, dtype: str) -> Any:
    """The cache of `generate`."""
    vocabulary = model.config.get_text_config().vocab_size
    coded = {"past_key_values": make_cache(model.config, dtype)} if dtype != OWN_CACHE else {}
    input_ids = (torch.arange(prompt_tokens) % vocabulary)[None].to(model.device)
    with torch.inference_mode():
        return model.generate(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
            return_dict_in_generate=True,
            **coded,
        ).past_key_values
