"""RoPE of what lies in a cache: cos and sin of its slots, and the rotation.

This file is shipped inside converted checkpoints: it imports torch only.
"""

from functools import cached_property

import torch
from torch import Tensor, nn

KEPT = 1 << 17  # turns of a layer that are not chosen again in the next step; of eight bytes in float32


class RotaryTable:
    """cos and sin of many slots, (1, S, rotary width) each, and the turns of the components that were asked for.

    A turn is cos and sin of one component at one slot. In memory the slots of a component lie next to each other, as
    rebuilt keys read them.
    """

    def __init__(self, cos: Tensor, sin: Tensor):
        self.cos, self.sin = cos.mT.contiguous().mT, sin.mT.contiguous().mT
        self.kept: dict[tuple[int, ...], Tensor] = {}

    @cached_property
    def turns(self) -> Tensor:
        """(1, S, rotary width / 2, 2)."""
        with torch.inference_mode(False):  # a later call may need gradients
            return turns(self.cos, self.sin, list(range(self.cos.shape[-1] // 2)))

    def components(self, length: int, frequencies: list[int]) -> Tensor:
        """The turns of some frequencies at the first slots, (1, length, their number, 2)."""
        known = tuple(frequencies)
        if self.cos.shape[1] * len(known) > KEPT:
            return columns(self.turns[:, :length], frequencies)
        if known not in self.kept:
            with torch.inference_mode(False):
                self.kept[known] = columns(self.turns, frequencies)
        return self.kept[known][:, :length]


class SlotEmbeddings:
    """cos and sin of the slots 0, 1, … of a cache, from the model's own rotary module; shared by layers alike.

    Not a module, so that the rotary module keeps its one place in the model.
    """

    def __init__(self, rotary: nn.Module, layer_type: str | None):
        by_type = hasattr(rotary, f"{layer_type}_inv_freq")  # some donors turn their local layers differently
        self.rotary, self.arguments = rotary, (layer_type,) if by_type else ()
        self.tables: dict[torch.device, RotaryTable] = {}

    def __call__(self, length: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """(1, length, rotary width) each, as the rotary module makes them for `like`, and on its device."""
        if torch.compiler.is_compiling():
            return self.embed(length, like)
        table = self.table(length, like)
        return table.cos[:, :length], table.sin[:, :length]

    def components(self, length: int, like: Tensor, frequencies: list[int]) -> Tensor:
        """The turns of some of the rotary frequencies, (1, length, their number, 2)."""
        if torch.compiler.is_compiling():
            return turns(*self.embed(length, like), frequencies)
        return self.table(length, like).components(length, frequencies)

    def table(self, length: int, like: Tensor) -> RotaryTable:
        """At least `length` slots, in the dtype and on the device of `like`; a later call may need gradients."""
        found = self.tables.get(like.device)
        if found is None or found.cos.shape[1] < length or found.cos.dtype != like.dtype:
            with torch.inference_mode(False):
                found = RotaryTable(*self.embed(1 << (length - 1).bit_length(), like))
            self.tables[like.device] = found
        return found

    @torch.no_grad()
    def embed(self, length: int, like: Tensor) -> tuple[Tensor, Tensor]:
        slots = torch.arange(length, device=like.device).unsqueeze(0)
        cos, sin = self.rotary(like, slots, *self.arguments)
        return cos.to(like.device), sin.to(like.device)  # the module may live on another device


def turns(cos: Tensor, sin: Tensor, components: list[int]) -> Tensor:
    """cos and sin [B, T, width] at some components, next to each other, at least float32: [B, T, their number, 2]."""
    both = torch.stack((cos[..., components], sin[..., components]), dim=-1)
    return both if both.dtype == torch.float64 else both.float()


def columns(of: Tensor, components: list[int]) -> Tensor:
    """Some of the turns [1, T, n, 2], as complex numbers: many times as fast as an index is."""
    chosen = torch.tensor(components, device=of.device).expand(1, of.shape[1], -1)
    return torch.view_as_real(torch.view_as_complex(of).gather(2, chosen))


def rotated(x: Tensor, by: Tensor) -> Tensor:
    """RoPE: x [B, heads, T, p], the two elements of a component side by side, by turns [B or 1, T, p / 2, 2].

    One complex product of whole rows, as decoding turns all that is cached: many times as fast as four real ones
    of every other element. A compiler makes one pass of those, and of complex numbers none.
    """
    wide = x if x.dtype == torch.float64 else x.float()
    pairs, by = wide.view(*wide.shape[:-1], -1, 2), by.unsqueeze(1).to(wide.dtype)
    if torch.compiler.is_compiling():
        (left, right), (cos, sin) = pairs.unbind(-1), by.unbind(-1)
        turned = torch.stack((left * cos - right * sin, right * cos + left * sin), dim=-1)
    else:
        steps = (pairs.storage_offset(), *pairs.stride()[:-1])
        if pairs.stride(-1) != 1 or any(step % 2 for step in steps):
            pairs = pairs.clone(memory_format=torch.contiguous_format)
        turned = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(by))
    return turned.flatten(-2).to(x.dtype)
