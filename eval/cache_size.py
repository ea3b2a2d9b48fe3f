"""The size of a model's cache, measured on the cache object after generation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..convert.bare_process.child import cache_storage
from .kv_cache.serving import WHOLE_GROUPS, make_cache
from .settings import OWN_CACHE


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


def measure_cache(
    model: Any, *, prompt_tokens: int | None = None, new_tokens: int = 4, dtype: str = OWN_CACHE
) -> CacheCost:
    """The size of the cache that `generate` returns after an arbitrary prompt.

    The cache holds prompt_tokens + new_tokens − 1 tokens, as the last generated one is not read back. By default these
    are whole groups of a coded cache, whatever the `dtype`, as tokens behind a sliding window weigh nothing.
    """
    if prompt_tokens is None:
        prompt_tokens = WHOLE_GROUPS + 1 - new_tokens
    vocabulary = model.config.get_text_config().vocab_size
    coded = {"past_key_values": make_cache(model.config, dtype)} if dtype != OWN_CACHE else {}
    input_ids = (torch.arange(prompt_tokens) % vocabulary)[None].to(model.device)
    with torch.inference_mode():
        output = model.generate(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
            return_dict_in_generate=True,
            **coded,
        )
    cache = output.past_key_values
    size, elements = cache_storage(cache)
    return CacheCost(type(cache).__name__, int(cache.get_seq_length()), size, elements)
