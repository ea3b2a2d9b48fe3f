"""transformers' attention function for texts beyond the trained length: up to it plain, behind it by chunks or window.

Rows of a batch are read one by one, from their first token: so left padding changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.weak import WeakTensorKeyDictionary
from transformers.cache_utils import DynamicLayer
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mhconvert.errors import MhconvertError

from .chunks import Chunks
from .window import Window

IMPLEMENTATION = "mhconvert_long_context"


class Reach:
    """What one model's attention reads beyond the trained length, and what is known of the chunks in its caches.

    The chunks of a cache are known by the very tensor of its keys: whatever reorders, crops or selects rows makes
    another tensor, of which nothing is known.
    """

    def __init__(self, rule: Chunks | Window) -> None:
        self.rule = rule
        self.known: Any = WeakTensorKeyDictionary()  # keys -> (first token, representations) of each row

    def attach(self, attention: Any) -> None:
        """Make an attention module read so. The module's function learns of its cache by a hook."""
        attention.register_forward_pre_hook(self._with_cache, with_kwargs=True)

    def _with_cache(
        self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        cache = kwargs.get("past_key_values")
        layers = cache.layers if cache is not None else ()
        held = layers[module.layer_idx].keys if module.layer_idx < len(layers) else None
        known = self.known.get(held) if held is not None else None
        return args, kwargs | {"reach": self, "known_chunks": known, "cache": cache}


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float,
    reach: Reach,
    known_chunks: Any = None,
    cache: Any = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """query (B, H, T, d), key and value (B, G, S, d), attention_mask (B, S) -> output (B, T, H, d)."""
    held = None if cache is None else _keys(cache, module.layer_idx)
    starts, rule = first_tokens(attention_mask), reach.rule
    beyond: list[Callable[..., Tensor]] = [rule.attend] * len(starts)
    if isinstance(rule, Chunks) and key.shape[2] > rule.trained:
        chunks = _represented(rule, key, starts, known_chunks)
        beyond = [partial(rule.attend, found=found) for _, found in chunks]
        if held is not None:
            reach.known[held] = chunks
    output = torch.zeros_like(query)
    for row, start in enumerate(starts):
        own = query[row], key[row, :, start:], value[row, :, start:]
        output[row] = _attend_row(*own, rule.trained, beyond[row], scaling)
    return output.transpose(1, 2).contiguous(), None


def _represented(
    rule: Chunks, key: Tensor, starts: list[int], known: list[tuple[int, Tensor]] | None
) -> list[tuple[int, Tensor]]:
    """Of each row of key (B, G, S, d) its first token, and what represents its chunks from there on; known: so far."""
    if known is None or [start for start, _ in known] != starts:
        return [(start, rule.represent(row[:, start:])) for row, start in zip(key, starts, strict=True)]
    return [
        (start, rule.represent(row[:, start:], old)) for row, (start, old) in zip(key, known, strict=True)
    ]


def _attend_row(
    query: Tensor, key: Tensor, value: Tensor, trained: int, beyond: Callable[..., Tensor], scaling: float
) -> Tensor:
    """Outputs (H, T, d) of one row's queries (H, T, d), zero for those of its padding; key, value (G, S, d) without."""
    length = key.shape[1]
    padding = max(0, query.shape[1] - length)
    first = length - query.shape[1] + padding  # position of the first query that is no padding
    near = max(0, min(length, trained) - first)  # queries that read everything before them
    parts = [torch.zeros_like(query[:, :padding])]
    query = query[:, padding:]
    if near:
        parts.append(_plain(query[:, :near], key[:, : first + near], value[:, : first + near], scaling))
    if near < query.shape[1]:
        parts.append(beyond(query[:, near:], key, value, first + near, scaling).to(query.dtype))
    return torch.cat(parts, dim=1)


def _plain(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """Causal attention of queries (H, T, d), the last of them at the last key."""
    new, seen = query.shape[1], key.shape[1]
    ragged = 1 < new < seen
    mask = query.new_ones(new, seen, dtype=torch.bool).tril(seen - new) if ragged else None
    batch = query[None], key[None], value[None], mask
    grouped = len(query) != len(key)
    return scaled_dot_product_attention(*batch, is_causal=new == seen, scale=scaling, enable_gqa=grouped)[0]


def first_tokens(attention_mask: Tensor) -> list[int]:
    """The index of each row's first token behind its padding. Raises MhconvertError for padding elsewhere."""
    seen = attention_mask.long()
    if attention_mask.dim() != 2 or bool((seen.diff(dim=1) < 0).any()) or not bool(seen[:, -1].all()):
        raise MhconvertError("--long-context reads rows that are padded on the left alone; pad them there")
    starts: list[int] = (seen.shape[1] - seen.sum(1)).tolist()
    return starts


def _keys(cache: Any, index: int) -> Any:
    """The tensor of a cache layer's keys. Raises MhconvertError for a layer that does not keep those of all tokens."""
    layer = cache.layers[index]
    if type(layer) is not DynamicLayer:
        raise MhconvertError(
            "--long-context longheads and window read transformers' DynamicCache, and this cache has a "
            f"{type(layer).__name__}; leave past_key_values and cache_implementation out"
        )
    return layer.keys


def padding_mask(
    batch_size: int, q_length: int, kv_length: int, attention_mask: Tensor | None = None, **options: Any
) -> Tensor:
    """transformers' mask function: which tokens are no padding (B, S) bool, and never None, with which the classes of
    converted checkpoints would go past the attention function.
    """
    if attention_mask is None:
        return torch.ones(batch_size, kv_length, dtype=torch.bool, device=options["device"])
    return attention_mask[:, -kv_length:]


ALL_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, attend)
ALL_MASK_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, padding_mask)
