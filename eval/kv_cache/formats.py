"""How one of the two tensors that an attention layer caches is stored: by channel, by token, or as fp8.

What is read is what is stored, but for one group: a token sees the newest keys, those of its own group of 32, as they
are, as it does when tokens come one by one and the group is not full yet.

Shapes: B batch, H heads, T tokens, d width. States go in and come out as (B, H, T, d).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .codes import GROUP, Coded, decode, encode

FP8 = torch.float8_e4m3fn
FP8_MAX = torch.finfo(FP8).max


class Stored(NamedTuple):
    """The tensors of one format. codes uint8; steps, zeros float16; rest (B, H, t, d), tokens that are not coded yet.

    Tensors that a format does not have are empty, with B as their first dimension.
    """

    codes: Tensor
    steps: Tensor
    zeros: Tensor
    rest: Tensor

    def map(self, function: Callable[[Tensor], Tensor]) -> Stored:
        """The same with `function` of each tensor, for what happens to whole rows of the batch."""
        return Stored(*map(function, self))


class Format(Protocol):
    """A way to store keys or values; the functions are pure."""

    def empty(self, like: Tensor) -> Stored:
        """What is stored of no tokens of states like `like`."""

    def append(self, stored: Stored, states: Tensor) -> tuple[Stored, Tensor]:
        """`stored` with the tokens of `states` behind it, and all tokens as their attention reads them."""

    def length(self, stored: Stored) -> int:
        """The tokens in `stored`."""

    def without_last(self, stored: Stored, tokens: int) -> Stored:
        """`stored` without its last `tokens` tokens. Raises ValueError where that cannot be undone exactly."""

    def without_first(self, stored: Stored, tokens: int) -> Stored:
        """`stored` without its first `tokens` tokens, a multiple of 32."""


class ByChannel:
    """32 tokens of one channel share a step. Tokens of an unfinished group are kept as they are until it is full.

    Of states that begin more than one group, all tokens read the groups before the last as codes.
    """

    def __init__(self, bits: int) -> None:
        self.bits = bits

    def empty(self, like: Tensor) -> Stored:
        codes = like.new_zeros(*like.shape[:2], like.shape[3], 0, dtype=torch.uint8)  # B H d, bytes of tokens
        steps = like.new_zeros(codes.shape, dtype=torch.float16)
        return Stored(codes, steps, steps.clone(), like.new_zeros(*like.shape[:2], 0, like.shape[3]))

    def append(self, stored: Stored, states: Tensor) -> tuple[Stored, Tensor]:
        rest = torch.cat((stored.rest, states), dim=2)
        full = rest.shape[2] // GROUP * GROUP
        if full:
            pairs = zip(stored[:3], encode(rest[:, :, :full].mT, self.bits), strict=True)
            codes, steps, zeros = (torch.cat(pair, dim=-1) for pair in pairs)
            # A copy, as a slice would keep the whole buffer in memory.
            after = Stored(codes, steps, zeros, rest[:, :, full:].clone())
        else:
            after = stored._replace(rest=rest)
        newest = max(0, rest.shape[2] - 1) // GROUP * GROUP
        coded = decode(Coded(*after[:3]), self.bits, after.steps.shape[-1] * GROUP, states.dtype).mT
        coded = coded[:, :, : coded.shape[2] - full + newest]
        return after, torch.cat((coded, rest[:, :, newest:]), dim=2)

    def length(self, stored: Stored) -> int:
        return stored.steps.shape[-1] * GROUP + stored.rest.shape[2]

    def without_last(self, stored: Stored, tokens: int) -> Stored:
        kept = stored.rest.shape[2] - tokens
        if kept < 0:
            raise ValueError(
                f"{tokens} tokens cannot be removed from a coded cache of {self.length(stored)}: {GROUP} keys are "
                f"coded together, and only the last {stored.rest.shape[2]} are not coded yet"
            )
        return stored._replace(rest=stored.rest[:, :, :kept].clone())

    def without_first(self, stored: Stored, tokens: int) -> Stored:
        groups = tokens // GROUP
        codes = stored.codes[..., groups * GROUP * self.bits // 8 :].clone()
        return stored._replace(
            codes=codes,
            steps=stored.steps[..., groups:].clone(),
            zeros=stored.zeros[..., groups:].clone(),
        )


class ByToken:
    """32 channels of one token share a step, so every token is coded as it comes."""

    def __init__(self, bits: int) -> None:
        self.bits = bits

    def empty(self, like: Tensor) -> Stored:
        coded = encode(like[:, :, :0], self.bits)
        return Stored(*coded, like.new_zeros(len(like), 0))

    def append(self, stored: Stored, states: Tensor) -> tuple[Stored, Tensor]:
        pairs = zip(stored[:3], encode(states, self.bits), strict=True)
        codes, steps, zeros = (torch.cat(pair, dim=2) for pair in pairs)
        read = decode(Coded(codes, steps, zeros), self.bits, states.shape[3], states.dtype)
        return Stored(codes, steps, zeros, stored.rest), read

    def length(self, stored: Stored) -> int:
        return stored.codes.shape[2]

    def without_last(self, stored: Stored, tokens: int) -> Stored:
        kept = self.length(stored) - tokens
        codes, steps, zeros = (part[:, :, :kept].clone() for part in stored[:3])
        return Stored(codes, steps, zeros, stored.rest)

    def without_first(self, stored: Stored, tokens: int) -> Stored:
        codes, steps, zeros = (part[:, :, tokens:].clone() for part in stored[:3])
        return Stored(codes, steps, zeros, stored.rest)


class Fp8(ByToken):
    """One byte an element, float8_e4m3fn with scale 1, as vLLM's kv_cache_dtype=fp8: ±448 is the largest number.

    The byte is stored as uint8, which every operation on batches takes. Infinities become NaN, which fp8 has.
    """

    def __init__(self) -> None:
        super().__init__(8)

    def empty(self, like: Tensor) -> Stored:
        none = like.new_zeros(*like.shape[:2], 0, 0, dtype=torch.float16)
        codes = like.new_zeros(*like.shape[:2], 0, like.shape[3], dtype=torch.uint8)
        return Stored(codes, none, none.clone(), like.new_zeros(len(like), 0))

    def append(self, stored: Stored, states: Tensor) -> tuple[Stored, Tensor]:
        finite = torch.where(states.isinf(), torch.nan, states.float()).clamp(-FP8_MAX, FP8_MAX)
        codes = torch.cat((stored.codes, finite.to(FP8).view(torch.uint8)), dim=2)
        return stored._replace(codes=codes), codes.view(FP8).to(states.dtype)
