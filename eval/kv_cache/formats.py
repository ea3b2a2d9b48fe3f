"""How one of the two tensors that an attention layer caches is stored: by channel, by token, or as fp8.

What is read back is what is stored: no query ever sees more than the cache keeps.

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

    def append(self, stored: Stored, states: Tensor) -> Stored:
        """`stored` and the tokens of `states` behind it."""

    def read(self, stored: Stored, like: Tensor) -> Tensor:
        """All tokens, in the dtype and width of the states `like`."""

    def length(self, stored: Stored) -> int:
        """The tokens in `stored`."""

    def without_last(self, stored: Stored, tokens: int) -> Stored:
        """`stored` without its last `tokens` tokens. Raises ValueError where that cannot be undone exactly."""

    def without_first(self, stored: Stored, tokens: int) -> Stored:
        """`stored` without its first `tokens` tokens, a multiple of 32."""


class ByChannel:
    """32 tokens of one channel share a step. Tokens of an unfinished group are kept as they are until it is full."""

    def __init__(self, bits: int) -> None:
        self.bits = bits

    def empty(self, like: Tensor) -> Stored:
        codes = like.new_zeros(*like.shape[:2], like.shape[3], 0, dtype=torch.uint8)  # B H d, bytes of tokens
        steps = like.new_zeros(codes.shape, dtype=torch.float16)
        return Stored(codes, steps, steps.clone(), like.new_zeros(*like.shape[:2], 0, like.shape[3]))

    def append(self, stored: Stored, states: Tensor) -> Stored:
        rest = torch.cat((stored.rest, states), dim=2)
        full = rest.shape[2] // GROUP * GROUP
        if not full:
            return stored._replace(rest=rest)
        coded = encode(rest[:, :, :full].mT, self.bits)
        pairs = zip(stored[:3], coded, strict=True)
        # A copy, as a slice would keep the whole buffer in memory.
        return Stored(*(torch.cat(pair, dim=-1) for pair in pairs), rest[:, :, full:].clone())

    def read(self, stored: Stored, like: Tensor) -> Tensor:
        tokens = stored.steps.shape[-1] * GROUP
        if not tokens:
            return stored.rest
        coded = decode(Coded(*stored[:3]), self.bits, tokens, like.dtype).mT
        return torch.cat((coded, stored.rest), dim=2)

    def length(self, stored: Stored) -> int:
        return stored.steps.shape[-1] * GROUP + stored.rest.shape[2]

    def without_last(self, stored: Stored, tokens: int) -> Stored:
        kept = stored.rest.shape[2] - tokens
        if kept < 0:
            raise ValueError(
                f"{tokens} tokens cannot be removed from a coded cache of {self.length(stored)}: {GROUP} keys are coded "
                f"together, and only the last {stored.rest.shape[2]} are not coded yet"
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

    def append(self, stored: Stored, states: Tensor) -> Stored:
        pairs = zip(stored[:3], encode(states, self.bits), strict=True)
        return Stored(*(torch.cat(pair, dim=2) for pair in pairs), stored.rest)

    def read(self, stored: Stored, like: Tensor) -> Tensor:
        return decode(Coded(*stored[:3]), self.bits, like.shape[3], like.dtype)

    def length(self, stored: Stored) -> int:
        return stored.codes.shape[2]

    def without_last(self, stored: Stored, tokens: int) -> Stored:
        kept = self.length(stored) - tokens
        return Stored(*(part[:, :, :kept].clone() for part in stored[:3]), stored.rest)

    def without_first(self, stored: Stored, tokens: int) -> Stored:
        return Stored(*(part[:, :, tokens:].clone() for part in stored[:3]), stored.rest)


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

    def append(self, stored: Stored, states: Tensor) -> Stored:
        finite = torch.where(states.isinf(), torch.nan, states.float()).clamp(-FP8_MAX, FP8_MAX)
        return stored._replace(codes=torch.cat((stored.codes, finite.to(FP8).view(torch.uint8)), dim=2))

    def read(self, stored: Stored, like: Tensor) -> Tensor:
        return stored.codes.view(FP8).to(like.dtype)
