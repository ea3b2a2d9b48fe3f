"""Codes of a few bits, packed into bytes: asymmetric min-max quantisation in groups of 32 (KIVI, arXiv 2402.02750).

A group keeps its least element and its step as float16, so with full groups an element costs bits + 1 bits in all.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

GROUP = 32  # elements that share a step, as in KIVI's experiments
BITS = (2, 3, 4, 8)
# bits -> codes that are packed together, the fewest that fill whole bytes
TOGETHER = {2: 4, 3: 8, 4: 2, 8: 1}


class Coded(NamedTuple):
    """Codes of a tensor (…, n) in ⌈n / 32⌉ groups along its last dimension, the last of them perhaps shorter.

    codes (…, bytes) uint8: whole bytes, see `pack`. steps, zeros (…, groups) float16.
    """

    codes: Tensor
    steps: Tensor
    zeros: Tensor


def encode(x: Tensor, bits: int) -> Coded:
    """Codes of `x` (…, n), any float dtype, whose error is at most half a step, to float32 rounding.

    Zeros are rounded down and steps up, so that float16 cuts no element off. A group with NaN, an infinity or elements
    that float16 does not reach decodes to NaN or infinities.
    """
    levels, width = 2**bits - 1, x.shape[-1]
    x = x.float()
    zeros = _rounded_down(_grouped(x, torch.inf).amin(-1))
    highest = _grouped(x, -torch.inf).amax(-1)
    steps = -_rounded_down((zeros.float() - highest) / levels)
    divisors = torch.where(steps == 0, 1, steps)
    codes = ((x - _each(zeros, width)) / _each(divisors, width)).round().clamp(0, levels)
    # Which byte NaN becomes is undefined; the group's own zero or step is NaN or infinite, and that decides.
    return Coded(pack(codes.nan_to_num(0).to(torch.uint8), bits), steps, zeros)


def decode(coded: Coded, bits: int, width: int, dtype: torch.dtype) -> Tensor:
    """The tensor (…, width) that `coded` stands for, computed in float32 and cast to `dtype`."""
    codes = unpack(coded.codes, bits, width).float()
    return (codes * _each(coded.steps, width) + _each(coded.zeros, width)).to(dtype)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes (…, n) uint8 below 2^bits -> bytes (…, ⌈n / c⌉ · c · bits / 8), where c codes fill whole bytes."""
    together = TOGETHER[bits]
    if together == 1:
        return codes
    codes = F.pad(codes, (0, -codes.shape[-1] % together)).unflatten(-1, (-1, together)).int()
    places = torch.arange(together, device=codes.device, dtype=torch.int32) * bits
    words = (codes << places).sum(-1, keepdim=True, dtype=torch.int32)  # at most 24 bits
    shifts = torch.arange(together * bits // 8, device=codes.device, dtype=torch.int32) * 8
    return ((words >> shifts) & 255).to(torch.uint8).flatten(-2)


def unpack(packed: Tensor, bits: int, width: int) -> Tensor:
    """The first `width` codes of what `pack` made: (…, width) uint8."""
    together = TOGETHER[bits]
    if together == 1:
        return packed
    parts = packed.unflatten(-1, (-1, together * bits // 8)).int()
    shifts = torch.arange(parts.shape[-1], device=packed.device, dtype=torch.int32) * 8
    words = (parts << shifts).sum(-1, keepdim=True, dtype=torch.int32)
    places = torch.arange(together, device=packed.device, dtype=torch.int32) * bits
    return ((words >> places) & (2**bits - 1)).to(torch.uint8).flatten(-2)[..., :width]


def _grouped(x: Tensor, filler: float) -> Tensor:
    """(…, n) -> (…, ⌈n / 32⌉, 32), the last group filled up."""
    groups = -(-x.shape[-1] // GROUP)
    return F.pad(x, (0, groups * GROUP - x.shape[-1]), value=filler).unflatten(-1, (groups, GROUP))


def _each(of_groups: Tensor, width: int) -> Tensor:
    """A group's value for each of its elements: (…, groups) -> (…, width) float32."""
    return of_groups.float().repeat_interleave(GROUP, dim=-1)[..., :width]


def _rounded_down(x: Tensor) -> Tensor:
    """`x`, float32, as the largest float16 that is not above it; NaN stays NaN."""
    half = x.to(torch.float16)
    bits = half.view(torch.int16)
    below = torch.where(bits < 0, bits + 1, bits - 1).view(torch.float16)  # negative numbers grow away from 0
    return torch.where(half.float() > x, below, half)
