"""Layers of coded latents that see a window of recent tokens and, behind it, the first tokens: their cache and masks.

Pretrained models park attention on the first tokens (arXiv 2309.17453), so that these stay in the cache. They are
turned by their true distance, and a text within the window is read as without one. This file is shipped inside
converted checkpoints: it imports torch and transformers only.

Shapes: B batch, T query tokens, S tokens so far, n recent tokens, K = FIRST + n keys, R bytes of a row.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward  # the one that knows softcap

FIRST = 4  # tokens of a text that are kept behind the window


class WindowRows(DynamicLayer):
    """The cache of one windowed layer: keys [B, 1, FIRST + n, R], the first tokens' rows and the last n of all rows.

    n is at most window - 1 between two calls: the next token sees itself too. The first tokens are there twice while
    they are recent. Its mask is that of a cache of all tokens, from which the layer takes its own.
    """

    def __init__(self, window: int):
        super().__init__()
        self.keys: Tensor
        self.window, self.seen, self.record_past = window, 0, False

    def activate_past_recording(self) -> None:
        """Drop rows in `crop` alone: transformers asks for it before it drafts tokens that it may take back."""
        self.record_past = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, starts: Any = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Cache rows [B, 1, T, R]; starts [B or 1], where sequences begin. Returns rows [B, 1, K, R], and no values."""
        rows = key_states
        if not self.is_initialized:
            self.lazy_initialization(rows, value_states)
            self.keys = rows.new_zeros(*rows.shape[:2], FIRST, rows.shape[-1])
        at = first_slots(rows.new_zeros(1).long() if starts is None else starts) - self.seen
        inside = (at >= 0) & (at < rows.shape[2])
        first = torch.where(inside[:, None, :, None], rows_at(rows, at), self.keys[:, :, :FIRST])
        whole = torch.cat((first, self.keys[:, :, FIRST:], rows), dim=2)
        self.seen += rows.shape[2]
        self._hold(whole if self.record_past else self._within(whole))
        return whole, whole[..., :0]

    def _hold(self, rows: Tensor) -> None:
        self.keys, self.values = rows, rows[..., :0]

    def _within(self, rows: Tensor) -> Tensor:
        dropped = rows.shape[2] - FIRST - (self.window - 1)
        return rows if dropped <= 0 else torch.cat((rows[:, :, :FIRST], rows[:, :, FIRST + dropped :]), dim=2)

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
        left = self.keys.shape[2] - FIRST - removed
        if removed and left < min(self.window - 1, self.seen - removed):
            raise ValueError(
                f"{removed} tokens cannot be cropped from a cache of {self.seen}: a layer with a window of "
                f"{self.window} tokens has dropped those that it would see then; call activate_past_recording() on "
                "the cache before, or read the text anew"
            )
        self.seen -= removed
        self._hold(self._within(self.keys[:, :, : self.keys.shape[2] - removed]))

    def reset(self) -> None:
        super().reset()
        self.seen = 0


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


def rows_at(rows: Tensor, at: Tensor) -> Tensor:
    """Of rows [B, 1, T, R] those at (B or 1, FIRST), or the nearest there are: [B, 1, FIRST, R]."""
    return torch.take_along_dim(rows, at.clamp(0, rows.shape[2] - 1)[:, None, :, None], dim=2)


def visible_slots(mask: Any, length: int) -> Tensor | None:
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


def attend_in_window(
    layer: Any,
    query: Tensor,
    written: Tensor,
    rows: Tensor,
    embeddings: tuple[Tensor, Tensor],
    mask: Any,
    cache: Cache | None,
    rotate: Callable,
    options: dict[str, Any],
) -> Tensor:
    """The heads' outputs [B, T, H d] of a CodedLatentAttention with a window.

    Args:
        query: [B, H, T, d] before RoPE; written [B, T, n], the latent, and rows [B, 1, T, R], its codes.
        embeddings: cos, sin [B or 1, T, rotary width] of the queries.
        mask: of the whole text, as the model makes it.
        rotate: RoPE.
        options: more arguments of the attention function.
    """
    length, visible = query.shape[2], visible_slots(mask, query.shape[2])
    starts = torch.zeros(1, dtype=torch.long, device=query.device)
    if visible is not None:
        starts = visible[:, 0].any(1).to(torch.uint8).argmax(-1)
    rows, slots_so_far, seen = _cached(layer, rows, starts, cache)
    count, device = rows.shape[2] - FIRST, query.device
    last = torch.arange(length, device=device) - length
    recent = torch.arange(slots_so_far - count, slots_so_far, device=device)
    view = Window(layer.kv_window, last + seen, first_slots(starts), recent, visible)
    of_queries, of_keys = _embeddings(layer, view, embeddings, slots_so_far, query)
    query, learns = rotate(query, *of_queries), written.requires_grad
    whole = slice(None)
    if cache is not None and not learns and length <= layer.max_absorbed_tokens:
        own = view.mask(whole, whole, query.dtype)
        if layer._few(length, own):
            return layer.read_in_blocks(query, rows, of_keys, own)
    latent = layer.code.decode(rows, query.dtype).mT.unflatten(0, (len(query), -1))
    if learns and count == length:  # straight-through: rounding has slope one
        exact = torch.cat((rows_at(written.unsqueeze(1), view.first)[:, 0], written), dim=1)
        latent = latent + F.pad(exact - exact.detach(), (0, 1))
    key, value = layer.keys_and_values(latent)
    return _attend(layer, view, query, rotate(key, *of_keys), value, slots_so_far == seen, options)


def _cached(layer: Any, rows: Tensor, starts: Tensor, cache: Any) -> tuple[Tensor, int, Any]:
    """Rows of the first tokens and the recent ones [B, 1, K, R], how many slots there are, and the tokens so far."""
    index = layer.layer_idx
    if cache is None:
        return torch.cat((rows_at(rows, first_slots(starts)), rows), dim=2), rows.shape[2], rows.shape[2]
    held = window_layer(cache, index, layer.kv_window)
    if held.is_initialized:
        layer._require_rows(held.keys)
    if isinstance(held, WindowRows):
        rows, _ = cache.update(rows, rows[..., :0], index, starts=starts)
        return rows, held.seen, held.seen
    rows, _ = cache.update(rows, rows[..., :0], index)
    layer._require_rows(rows)
    slots = rows.shape[2]
    return torch.cat((rows_at(rows, first_slots(starts)), rows), dim=2), slots, cache.get_seq_length(index)


def _embeddings(
    layer: Any, view: Window, embeddings: tuple[Tensor, Tensor], slots: int, like: Tensor
) -> tuple[list[Tensor], list[Tensor]]:
    """cos, sin of queries [B or 1, T, w] and of keys [B or 1, K, w]. A mask numbers the slots that any query sees."""
    keys = torch.cat((view.first, view.recent.expand(len(view.first), -1)), dim=-1).clamp(max=slots - 1)
    if slots == len(view.queries):
        return list(embeddings), [torch.take_along_dim(each, keys[..., None], dim=1) for each in embeddings]
    positions = torch.arange(slots, device=like.device).unsqueeze(0)
    if view.visible is not None:
        positions = (view.visible[:, 0].any(1).cumsum(-1) - 1).clamp_min(0)
    tables = layer.slots()(slots, like)

    def taken(at: Tensor) -> list[Tensor]:
        chosen = torch.take_along_dim(positions, at, dim=1).unsqueeze(-1)
        return [torch.take_along_dim(each, chosen, dim=1) for each in tables]

    return taken(view.queries.unsqueeze(0)), taken(keys)


def _attend(
    layer: Any,
    view: Window,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    in_order: Any,
    options: dict[str, Any],
) -> Tensor:
    """[B, T, H d], a block of queries at a time. in_order: whether the last keys are the queries' own."""
    kind = layer.config._attn_implementation
    attention: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
        kind if kind in ("eager", "sdpa") else "sdpa", eager_attention_forward
    )
    if layer.softcap is not None:
        options = options | {"softcap": layer.softcap}
    outputs = []
    for rows, columns in view.blocks() if in_order else [(slice(None), slice(None))]:
        parts = [torch.cat((x[:, :, :FIRST], x[:, :, FIRST:][:, :, columns]), dim=2) for x in (key, value)]
        output, _ = attention(
            layer,
            query[:, :, rows],
            *parts,
            view.mask(rows, columns, query.dtype),
            dropout=layer.attention_dropout if layer.training else 0.0,
            scaling=layer.scaling,
            **options,
        )
        outputs.append(output.flatten(2))
    return torch.cat(outputs, dim=1)
