"""The code of a token: what is packed comes back, each component is at its nearest level, sinks and outliers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mhconvert.convert.methods.mla.bit_allocation import DISTORTION
from mhconvert.convert.methods.mla.code_levels import fitted_levels, layer_levels, normal_levels
from mhconvert.convert.methods.mla.latent_code import FEW_TOKENS, SINK, WIDTHS, LatentCode, row_bytes

COUNTS = [3, 2, 1, 5, 7, 4, 9, 11]


def code(counts: list[int], sink: Tensor | None = None) -> LatentCode:
    made = LatentCode(counts)
    made.levels.data = torch.cat([normal_levels(width) for width in WIDTHS]).float()
    made.sink.data = torch.full((sum(counts),), 40.0) if sink is None else sink
    return made


def tokens(rows: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(2, rows, width, generator=torch.Generator().manual_seed(seed))


@given(st.lists(st.integers(0, 9), min_size=8, max_size=8).filter(any), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_bytes_hold_every_code(counts: list[int], seed: int) -> None:
    coder = code(counts)
    generator = torch.Generator().manual_seed(seed)
    codes = torch.cat(
        [
            torch.randint(0, 2**width, (3, stop - start), generator=generator).to(torch.uint8)
            for width, start, stop in coder.ranges
        ],
        dim=-1,
    )
    packed = coder.pack(codes.mT)
    assert packed.shape == (row_bytes(counts) - 1, 3)
    assert packed.dtype == torch.uint8
    assert torch.equal(coder.unpack(packed).mT, codes)
    bits = sum(width * count for width, count in zip(WIDTHS, counts, strict=True))
    assert (
        bits / 8 <= row_bytes(counts) - 1 < bits / 8 + 4
    )  # each of four fields is rounded up by less than a byte


def test_errors_are_those_of_the_best_quantisers() -> None:
    """Of normal components; the gain of a token adds to its error less than a tenth."""
    coder, z = code([20] * 8), tokens(4000, 160)
    errors = (coder(z)[..., :-1] - z).square()
    for width, start, stop in coder.ranges:
        assert errors[..., start:stop].mean().item() == pytest.approx(DISTORTION[width], rel=0.1)


@pytest.mark.parametrize("width", range(1, 9))
def test_normal_levels_are_the_best(width: int) -> None:
    """The error of 2^width levels for a normal variable, against the published table."""
    samples = torch.special.ndtri((torch.arange(1 << 16, dtype=torch.float64) + 0.5) / (1 << 16))
    levels = normal_levels(width)
    nearest = levels[torch.bucketize(samples, (levels[1:] + levels[:-1]) / 2)]
    assert (samples - nearest).square().mean().item() == pytest.approx(DISTORTION[width], rel=0.05)


def test_fitted_levels_never_do_worse() -> None:
    samples = tokens(500, 4).flatten().double().pow(3)  # heavy tails
    start = normal_levels(4)

    def error(levels: Tensor) -> float:
        nearest = levels[torch.bucketize(samples, (levels[1:] + levels[:-1]) / 2)]
        return (samples - nearest).square().mean().item()

    assert error(fitted_levels(samples, start)) < 0.6 * error(start)


def test_levels_of_a_width_with_few_samples_stay_normal() -> None:
    coder = code([1, 0, 0, 0, 0, 0, 0, 40])
    levels = layer_levels(tokens(8, 41).flatten(0, 1) * 3, coder.ranges)
    assert torch.equal(levels[:256], normal_levels(8))
    assert levels[-2:].tolist() != normal_levels(1).tolist()


@pytest.mark.parametrize(
    "counts", [COUNTS, [0] * 7 + [1], [3] + [0] * 7, [0, 0, 9, 0, 0, 17, 0, 0], [20] * 8], ids=str
)
def test_many_tokens_have_the_codes_that_each_has_alone(counts: list[int]) -> None:
    """More than FEW_TOKENS go through other operations, in both directions."""
    coder, z = code(counts), tokens(FEW_TOKENS, sum(counts), seed=7)
    coder.sink.data = tokens(1, sum(counts), seed=8)[0, 0] * 6
    z[1, 3], z[1, 5] = coder.sink, torch.nan
    together = coder.encode(z)
    alone = torch.cat([coder.encode(part) for part in z.flatten(0, 1).split(3)]).view_as(together)
    finite = z.isfinite().all(-1)
    assert torch.equal(together[finite], alone[finite])
    assert (together[~finite, 0] == alone[~finite, 0]).all()
    decoded = coder.decode(together, torch.float32)
    parts = [coder.decode(part, torch.float32) for part in together.flatten(0, 1).split(3)]
    torch.testing.assert_close(decoded, torch.cat(parts, dim=1), rtol=1e-6, atol=0, equal_nan=True)  # gains
    assert decoded[:-1].isnan().any(0).sum() == 1


def test_a_sink_is_told_from_other_tokens_and_costs_nothing_else() -> None:
    sink = tokens(1, 42, seed=5)[0, 0] * 6
    coder, z = code(COUNTS, sink), tokens(20, 42)
    z[0, 0] = sink + 0.01 * z[0, 0]
    rows, decoded = coder.encode(z), coder(z)
    assert (rows[..., 0] >= SINK).nonzero().tolist() == [[0, 0]]
    assert decoded[0, 0, -1] == 1
    assert decoded[0, 1:, -1].sum() == 0
    assert (decoded[0, 0, :-1] - (z[0, 0] - sink)).abs().max() < 0.03  # the rest has a gain of its own


def test_an_outlier_leaves_its_neighbours_as_they_were() -> None:
    coder, z = code(COUNTS), tokens(20, 42)
    coder.sink.data *= 1000
    large = z.clone()
    large[0, 3] *= 100
    rows, changed = coder.encode(z), coder.encode(large)
    others = [index for index in range(20) if index != 3]
    assert torch.equal(rows[0, others], changed[0, others])
    decoded = coder(large)[0, 3, :-1]
    assert ((decoded - large[0, 3]).norm() / large[0, 3].norm()).item() == pytest.approx(
        ((coder(z)[0, 3, :-1] - z[0, 3]).norm() / z[0, 3].norm()).item(), rel=0.3
    )


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_stays_so_and_stays_in_its_token(wrong: float) -> None:
    coder, z = code(COUNTS), tokens(20, 42)
    before = coder(z)
    z[0, 3, 5] = wrong
    decoded = coder(z)
    assert decoded[0, 3, :-1].isnan().all()
    others = [index for index in range(20) if index != 3]
    assert torch.equal(decoded[0, others], before[0, others])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_zeros_constants_and_half_precision(dtype: torch.dtype) -> None:
    coder = code(COUNTS)
    z = torch.cat((torch.zeros(1, 2, 42), torch.full((1, 2, 42), 0.5)), dim=1).to(dtype)
    decoded = coder(z)
    assert decoded.dtype == dtype
    assert decoded.isfinite().all()
    assert decoded[0, :2].abs().max() < 0.02
    assert coder.encode(z).shape == (1, 4, row_bytes(COUNTS))


@pytest.mark.parametrize("factor", [1e-2, 1.0, 1e2, 1e3])
def test_relative_error_does_not_depend_on_the_size(factor: float) -> None:
    """From a hundredth to a thousand times the usual size of a token."""
    coder, z = code([20] * 8, sink=torch.full((160,), 1e6)), tokens(50, 160)
    error = ((coder(z * factor)[..., :-1] - z * factor).norm() / (z * factor).norm()).item()
    assert error == pytest.approx(sum(DISTORTION[1:]) ** 0.5 / 8**0.5, rel=0.1)
