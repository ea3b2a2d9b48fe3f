"""RoPE of what lies in a cache: cos and sin of its slots, and the rotation.

This file is shipped inside converted checkpoints: it imports torch only.
"""

import torch
from torch import Tensor, nn

KEPT = 1 << 16  # elements of a layer's cos, and of its sin


class SlotEmbeddings:
    """cos and sin of the slots 0, 1, … of a cache, from the model's own rotary module; shared by layers alike.

    Not a module, so that the rotary module keeps its one place in the model.
    """

    def __init__(self, rotary: nn.Module, layer_type: str | None):
        by_type = hasattr(rotary, f"{layer_type}_inv_freq")  # some donors turn their local layers differently
        self.rotary, self.arguments = rotary, (layer_type,) if by_type else ()
        self.table: tuple[Tensor, Tensor] | None = None
        self.made_like: tuple[torch.device, torch.dtype] | None = None
        self.kept: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}  # of the table, by frequencies

    def __call__(self, length: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """(1, length, rotary width) each, as the rotary module makes them for `like`, and on its device."""
        if torch.compiler.is_compiling():
            return self.embed(length, like)
        kind = (like.device, like.dtype)
        if self.table is None or self.table[0].shape[1] < length or self.made_like != kind:
            self.table, self.made_like = self.embed(1 << (length - 1).bit_length(), like), kind
            self.kept = {}
        return self.table[0][:, :length], self.table[1][:, :length]

    def components(
        self, length: int, like: Tensor, frequencies: tuple[int, ...] | None
    ) -> tuple[Tensor, Tensor]:
        """The same at some of the rotary frequencies, (1, length, their number), or at all of them; where they are few
        they are not chosen again in the next step.
        """
        cos, sin = self(length, like)
        if frequencies is None:
            return cos, sin
        chosen = list(frequencies)
        if torch.compiler.is_compiling() or self.table is None or self.table[0].shape[1] * len(chosen) > KEPT:
            return cos[..., chosen], sin[..., chosen]
        if frequencies not in self.kept:
            self.kept[frequencies] = self.table[0][..., chosen], self.table[1][..., chosen]
        cos, sin = self.kept[frequencies]
        return cos[:, :length], sin[:, :length]

    @torch.no_grad()
    def embed(self, length: int, like: Tensor) -> tuple[Tensor, Tensor]:
        slots = torch.arange(length, device=like.device).unsqueeze(0)
        cos, sin = self.rotary(like, slots, *self.arguments)
        return cos.to(like.device), sin.to(like.device)  # the module may live on another device


def rotated(x: Tensor, embeddings: tuple[Tensor, Tensor]) -> Tensor:
    """RoPE: x [B, heads, T, p], the two elements of a component side by side, by cos and sin [B or 1, T, p / 2].

    One complex product of whole rows, as decoding turns all that is cached: many times as fast as four real ones
    of every other element. A compiler makes one pass of those, and of complex numbers none.
    """
    wide = x if x.dtype == torch.float64 else x.float()
    cos, sin = (e.unsqueeze(1).to(wide.dtype) for e in embeddings)
    pairs = wide.unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling():
        left, right = pairs.unbind(-1)
        turned = torch.stack((left * cos - right * sin, right * cos + left * sin), dim=-1)
    else:
        if pairs.storage_offset() % 2 or not pairs.is_contiguous():
            pairs = pairs.clone(memory_format=torch.contiguous_format)
        turned = torch.view_as_real(torch.view_as_complex(pairs) * torch.complex(cos, sin))
    return turned.flatten(-2).to(x.dtype)
