"""Coded latents in layers that see a window of recent tokens and, behind it, the first tokens.

Keys are turned by their true distance. This file is shipped inside converted checkpoints: it imports torch,
transformers and its siblings only.

Shapes: B batch, H query heads, T query tokens, S tokens so far, n recent tokens, K = FIRST + n keys, R bytes of a row.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import Cache

from .first_tokens import (
    Window,
    WindowRows,
    attend,
    sequence_starts,
    visible_slots,
    window_layer,
    window_view,
    with_first,
)


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
    length, visible = query.shape[2], visible_slots(mask)
    starts = sequence_starts(visible, query)
    rows, slots_so_far, seen = _cached(layer, rows, starts, cache)
    view = window_view(layer.kv_window, length, rows.shape[2], slots_so_far, seen, starts, visible)
    of_queries, of_keys = _embeddings(layer, view, embeddings, slots_so_far, query)
    query, learns = rotate(query, *of_queries), written.requires_grad
    whole = slice(None)
    if cache is not None and not learns and length <= layer.max_absorbed_tokens:
        own = view.mask(whole, whole, query.dtype)
        if layer._few(length, own):
            return layer.read_in_blocks(query, rows, of_keys, own)
    latent = layer.code.decode(rows, query.dtype).mT.unflatten(0, (len(query), -1))
    if learns and len(view.recent) == length:  # straight-through: rounding has slope one
        exact = with_first(written.unsqueeze(1), starts)[:, 0]
        latent = latent + F.pad(exact - exact.detach(), (0, 1))
    key, value = layer.keys_and_values(latent)
    if layer.softcap is not None:
        options = options | {"softcap": layer.softcap}
    dropout = layer.attention_dropout if layer.training else 0.0
    options = options | {"dropout": dropout, "scaling": layer.scaling}
    kind, in_order = layer.config._attn_implementation, slots_so_far == seen
    return attend(layer, kind, view, query, rotate(key, *of_keys), value, in_order, **options).flatten(2)


def _cached(layer: Any, rows: Tensor, starts: Tensor, cache: Any) -> tuple[Tensor, int, Any]:
    """Rows of the first tokens and the recent ones [B, 1, K, R], how many slots there are, and the tokens so far."""
    index = layer.layer_idx
    if cache is None:
        return with_first(rows, starts), rows.shape[2], rows.shape[2]
    held = window_layer(cache, index, layer.kv_window)
    if held.is_initialized:
        layer._require_rows(held.keys)
    held.starts = starts
    rows, _ = cache.update(rows, rows[..., :0], index)
    if isinstance(held, WindowRows):
        return rows, held.seen, held.seen
    layer._require_rows(rows)
    slots = rows.shape[2]
    return with_first(rows, starts), slots, cache.get_seq_length(index)


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
