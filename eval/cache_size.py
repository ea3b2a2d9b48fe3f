"""What a model costs to run: the cache that it really fills."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..convert.bare_process.child import cache_storage


@dataclass(frozen=True)
class CacheCost:
    """A cache object after `generate`, batch 1. bytes and elements are of tensor storage over all layers."""

    kind: str
    tokens: int
    bytes: int
    elements: int

    @property
    def bytes_per_token(self) -> float:
        return self.bytes / self.tokens

    @property
    def elements_per_token(self) -> float:
        return self.elements / self.tokens


def measure_cache(model: Any, *, prompt_tokens: int = 16, new_tokens: int = 4) -> CacheCost:
    """Generate greedily from an arbitrary prompt and weigh the cache that `generate` returns.

    The cache holds prompt_tokens + new_tokens − 1 tokens: the last one generated is never read back.
    """
    vocabulary = model.config.get_text_config().vocab_size
    input_ids = (torch.arange(prompt_tokens) % vocabulary)[None].to(model.device)
    with torch.inference_mode():
        output = model.generate(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
            return_dict_in_generate=True,
        )
    cache = output.past_key_values
    size, elements = cache_storage(cache)
    return CacheCost(type(cache).__name__, int(cache.get_seq_length()), size, elements)
