"""Codes of a few bits: their error is half a step, their bytes are what the formula says, and NaN stays NaN."""

from __future__ import annotations

import math

import pytest
import torch

from mhconvert.eval.kv_cache.codes import BITS, decode, encode, pack, unpack


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("width", [1, 5, 16, 32, 40, 64, 80])
def test_the_error_is_at_most_half_a_step(generator: torch.Generator, bits: int, width: int) -> None:
    """Elements far from 0 with small and with large spans; the last group may be shorter than 32."""
    scale = torch.tensor([0.01, 1.0, 30.0])[:, None, None]
    x = torch.randn(3, 7, width, generator=generator) * scale
    x = x + 100 * torch.randn(3, 7, 1, generator=generator)
    coded = encode(x, bits)
    error = (x - decode(coded, bits, width, torch.float32)).abs()
    steps = coded.steps.float().repeat_interleave(32, -1)[..., :width]
    assert coded.steps.shape[-1] == math.ceil(width / 32)
    assert bool((error <= steps / 2 + 1e-6 * x.abs()).all())  # and float32 rounding of x itself
    span = x.amax(-1) - x.amin(-1)
    # A step is the span's share, and what float16 rounds the zero and the step by.
    assert bool(
        (
            coded.steps.float().amax(-1) * (2**bits - 1) <= 1.002 * span + 2**-10 * x.abs().amax(-1) + 1e-3
        ).all()
    )


@pytest.mark.parametrize("bits", BITS)
def test_codes_come_back_from_their_bytes(generator: torch.Generator, bits: int) -> None:
    for width in (1, 7, 8, 32, 80):
        codes = torch.randint(0, 2**bits, (3, 2, width), generator=generator, dtype=torch.uint8)
        packed = pack(codes, bits)
        assert torch.equal(unpack(packed, bits, width), codes)
        if width % 8 == 0:
            assert packed.shape[-1] * 8 == width * bits
        assert packed.dtype == torch.uint8


@pytest.mark.parametrize(("value", "exact"), [(0.0, True), (3.3, False), (-1e-9, False), (1.5, True)])
def test_a_constant_group(value: float, exact: bool) -> None:
    found = decode(encode(torch.full((1, 32), value), 2), 2, 32, torch.float32)
    assert bool((found == value).all()) if exact else bool(((found - value).abs() < 1e-3).all())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e8, -1e6])
@pytest.mark.parametrize("bits", BITS)
def test_what_cannot_be_coded_is_no_number(generator: torch.Generator, bits: int, bad: float) -> None:
    """NaN, infinities, and spans that float16 does not hold: the whole group, and no other."""
    x = torch.randn(2, 64, generator=generator)
    x[0, 3] = bad
    found = decode(encode(x, bits), bits, 64, torch.float32).isfinite()
    assert not found[0, :32].any()
    assert bool(found[0, 32:].all())
    assert bool(found[1].all())
