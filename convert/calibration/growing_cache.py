"""A cache of keys and values for sampling many rows: tokens are written into room that is there already."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

FIRST_ROOM = 64  # tokens


class GrowingLayer(DynamicLayer):
    """One layer's cache. Its room doubles when it is full; a `DynamicLayer` copies all that it has in each step.

    keys and values, (B, G, tokens, d), are views of the room.
    """

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """All keys and values, those given behind the earlier ones."""
        seen = self.get_seq_length()
        length = seen + key_states.shape[-2]
        if not seen:
            self.rooms = [x.new_empty(*x.shape[:2], 0, x.shape[-1]) for x in (key_states, value_states)]
            self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
        if length > self.rooms[0].shape[2]:
            size = max(FIRST_ROOM, 1 << (length - 1).bit_length())
            grown = [room.new_empty(*room.shape[:2], size, room.shape[3]) for room in self.rooms]
            for room, old in zip(grown, self.rooms, strict=True):
                room[:, :, :seen] = old[:, :, :seen]
            self.rooms = grown
        for room, new in zip(self.rooms, (key_states, value_states), strict=True):
            room[:, :, seen:length] = new
        self.keys, self.values = (room[:, :, :length] for room in self.rooms)
        return self.keys, self.values


def growing_cache() -> Cache:
    """An empty cache for a model whose layers all cache keys and values."""
    return Cache(layer_class_to_replicate=GrowingLayer)
