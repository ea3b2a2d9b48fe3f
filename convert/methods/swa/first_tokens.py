"""Layers that see a window of recent tokens and, behind it, the first tokens of the text: cache, masks and attention.

Pretrained models park attention on the first tokens (arXiv 2309.17453), so that these stay in the cache. A text within
the window is read as without one. This file is shipped inside converted checkpoints: it imports torch and transformers
only. It lies in the folder of each method whose files import it.

Shapes: B batch, H query heads, G KV heads, T query tokens, S tokens so far, n recent tokens, K = FIRST + n keys, d
head_dim.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward  # the one that knows softcap

FIRST = 4  # tokens of a text that are kept behind the window


class WindowRows(DynamicLayer):
    """The cache of one windowed layer: of keys and values [B, G, FIRST + n, d] the first tokens' and the last n of all.

    n is at most window - 1 between two calls: the next token sees itself too. The first tokens are there twice while
    they are recent. Its mask is that of a cache of all tokens, from which the layer takes its own.

    Attributes:
        starts: (B or 1), the slots where the sequences begin; whoever updates the cache says them before.
    """

    def __init__(self, window: int):
        super().__init__()
        self.keys: Tensor
        self.values: Tensor
        self.window, self.seen, self.record_past = window, 0, False
        self.starts: Tensor | None = None

    def activate_past_recording(self) -> None:
        """Drop tokens in `crop` alone: transformers asks for it before it drafts tokens that it may take back."""
        self.record_past = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Cache keys and values [B, G, T, d]; returns those of K tokens."""
        new = (key_states, value_states)
        if not self.is_initialized:
            self.lazy_initialization(*new)
            self._hold([x.new_zeros(*x.shape[:2], FIRST, x.shape[-1]) for x in new])
        length = key_states.shape[2]
        starts = key_states.new_zeros(1, dtype=torch.long) if self.starts is None else self.starts
        at = first_slots(starts) - self.seen
        inside = ((at >= 0) & (at < length))[:, None, :, None]
        whole = [
            torch.cat(
                (torch.where(inside, at_slots(x, at), held[:, :, :FIRST]), held[:, :, FIRST:], x), dim=2
            )
            for x, held in zip(new, (self.keys, self.values), strict=True)
        ]
        self.seen += length
        self._hold(whole if self.record_past else self._within(whole))
        return whole[0], whole[1]

    def _hold(self, states: list[Tensor]) -> None:
        self.keys, self.values = states

    def _within(self, states: list[Tensor]) -> list[Tensor]:
        dropped = states[0].shape[2] - FIRST - (self.window - 1)
        if dropped <= 0:
            return states
        return [torch.cat((x[:, :, :FIRST], x[:, :, FIRST + dropped :]), dim=2) for x in states]

    def get_seq_length(self) -> int:
        """Tokens so far, dropped ones included."""
        return self.seen

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last -tokens_to_remove tokens. Raises ValueError where what came before them was dropped."""
        removed = -tokens_to_remove
        if removed < 0:
            raise ValueError(f"crop takes a negative number of tokens to remove, not {tokens_to_remove}")
        if not self.is_initialized:
            return
        held = self.keys.shape[2] - FIRST - removed
        if removed and held < min(self.window - 1, self.seen - removed):
            raise ValueError(
                f"{removed} tokens cannot be cropped from a cache of {self.seen}: a layer with a window of "
                f"{self.window} tokens has dropped those that it would see then; call activate_past_recording() on "
                "the cache before, or read the text anew"
            )
        self.seen -= removed
        left = self.keys.shape[2] - removed
        self._hold(self._within([self.keys[:, :, :left], self.values[:, :, :left]]))

    def reset(self) -> None:
        super().reset()
        self.seen, self.starts = 0, None


def window_layer(cache: Any, index: int, window: int) -> Any:
    """The layer `index` of a transformers cache: a WindowRows where it would be an empty DynamicLayer.

    Others, such as those of a static cache, hold all tokens, and the mask alone makes the window.
    """
    while len(cache.layers) <= index and cache.layer_class_to_replicate is not None:
        cache.layers.append(cache.layer_class_to_replicate())
    held = cache.layers[index]
    if type(held) is DynamicLayer and not held.is_initialized:
        held = cache.layers[index] = WindowRows(window)
    return held


def place_windows(cache: Any, windows: list[int | None], recording: bool) -> None:
    """Make the layers of a cache that have windows before the model is called.

    Drafting asks the layers of a cache to record the past before the prompt is read.
    """
    for index, window in enumerate(windows):
        if window is not None:
            window_layer(cache, index, window)
    if recording:
        cache.activate_past_recording()


def first_slots(starts: Tensor) -> Tensor:
    """(B or 1, FIRST), the slots of the first tokens of sequences that begin at `starts` (B or 1)."""
    return starts.unsqueeze(-1) + torch.arange(FIRST, device=starts.device)


def at_slots(states: Tensor, at: Tensor) -> Tensor:
    """Of [B, G, T, d] those at (B or 1, FIRST), or the nearest there are: [B, G, FIRST, d]."""
    return torch.take_along_dim(states, at.clamp(0, states.shape[2] - 1)[:, None, :, None], dim=2)


def with_first(states: Tensor, starts: Tensor) -> Tensor:
    """All states [B, G, S, d] behind those of the first tokens of sequences that begin at `starts`."""
    return torch.cat((at_slots(states, first_slots(starts)), states), dim=2)


def visible_slots(mask: Any) -> Tensor | None:
    """What a mask of transformers lets queries see, boolean [B or 1, 1, T or 1, S]; None where it is causal alone."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor):
        raise ValueError(
            f"a windowed layer reads no {type(mask).__name__} mask; load the model with attn_implementation='sdpa'"
        )
    visible = mask if mask.dtype == torch.bool else mask == (1 if mask.dim() == 2 else 0)
    return visible[:, None, None] if mask.dim() == 2 else visible[:, :1]


@dataclass(frozen=True)
class Window:
    """Which keys a layer's queries see.

    Attributes:
        width: tokens, itself included.
        queries: (T,), their slots.
        first: (B or 1, FIRST), the first tokens' slots.
        recent: (n,), the slots of the recent keys, ascending.
        visible: as `visible_slots` has it.
    """

    width: int
    queries: Tensor
    first: Tensor
    recent: Tensor
    visible: Tensor | None

    def mask(self, queries: slice, recent: slice, dtype: torch.dtype) -> Tensor:
        """Added to scores of some queries with the first and some of the recent keys: [B or 1, 1, t, FIRST + k].

        Finite, so that padding, which sees nothing, gives numbers.
        """
        at = self.queries[queries, None]
        to_first, to_recent = at - self.first[:, None], at - self.recent[recent]
        seen = [to_first >= self.width, ((to_recent >= 0) & (to_recent < self.width)).unsqueeze(0)]
        if self.visible is not None:
            rows = self.visible[:, 0]
            rows = rows[:, queries] if rows.shape[1] > 1 else rows
            slots = self.first.clamp(max=rows.shape[-1] - 1)[:, None]
            seen[0] = seen[0] & torch.take_along_dim(rows, slots, dim=2)
            seen[1] = seen[1] & rows[..., self.recent[recent]]
        size = max(map(len, seen))
        allowed = torch.cat([each.expand(size, -1, -1) for each in seen], dim=-1).unsqueeze(1)
        return torch.zeros_like(allowed, dtype=dtype).masked_fill(~allowed, torch.finfo(dtype).min)

    def blocks(self) -> Iterator[tuple[slice, slice]]:
        """Queries, a window of them at a time, and the recent keys that any of these may see."""
        length, count = len(self.queries), len(self.recent)
        for start in range(0, length, self.width):
            stop = min(start + self.width, length)
            before = count - length  # keys of earlier calls
            yield slice(start, stop), slice(max(0, before + start - self.width + 1), before + stop)


def sequence_starts(visible: Tensor | None, like: Tensor) -> Tensor:
    """(B or 1), the first slot that any query sees by `visible_slots`; `like`: a tensor on the device."""
    if visible is None:
        return torch.zeros(1, dtype=torch.long, device=like.device)
    return visible[:, 0].any(1).to(torch.uint8).argmax(-1)


def window_view(
    width: int, length: int, keys: int, slots: int, seen: Any, starts: Tensor, visible: Tensor | None
) -> Window:
    """What the last `length` of `seen` tokens see of `keys` keys, the first tokens' before those of the last slots.

    slots: that there are; more than `seen` in a static cache. starts, visible: of `sequence_starts`, `visible_slots`.
    """
    at = torch.arange(slots - (keys - FIRST), slots, device=starts.device)
    queries = torch.arange(length, device=starts.device) - length + seen
    return Window(width, queries, first_slots(starts), at, visible)


def attend(
    layer: Any,
    kind: str | None,
    view: Window,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    in_order: Any,
    **options: Any,
) -> Tensor:
    """Attention in a window, [B, T, H, d].

    Args:
        layer: the attention module, as functions of transformers take it.
        kind: the model's `_attn_implementation`; one that takes no such mask is replaced by sdpa.
        query: [B, H, T, d]; key, value: [B, G, K, d], the first tokens' before the recent ones'.
        in_order: whether the last keys are the queries' own, so that a block of queries reads a few of them.
        options: of the attention function: dropout, scaling, softcap …
    """
    eager = kind == "eager" or options.get("softcap") is not None
    attention: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
        "eager" if eager else "sdpa", eager_attention_forward
    )
    outputs = []
    for rows, columns in view.blocks() if in_order else [(slice(None), slice(None))]:
        parts = [torch.cat((x[:, :, :FIRST], x[:, :, FIRST:][:, :, columns]), dim=2) for x in (key, value)]
        mask = view.mask(rows, columns, query.dtype)
        outputs.append(attention(layer, query[:, :, rows], *parts, mask, **options)[0])
    return torch.cat(outputs, dim=1)
