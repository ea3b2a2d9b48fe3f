"""The choice of windows and bits: brute force on small models, and which way it goes."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from mhconvert.convert.methods.mla.bit_allocation import (
    ANY,
    DISTORTION,
    allocate,
    at_level,
    expected_divergence,
    width_counts,
)
from mhconvert.convert.methods.mla.latent_code import row_bytes
from mhconvert.convert.methods.mla_swa.window_bits import choose, with_windows

CONTEXT, HELD = 512, 66


def layers(seed: int, number: int, elements: int = 48) -> tuple[list[Tensor], list[float]]:
    generator = torch.Generator().manual_seed(seed)
    decay = torch.logspace(0, -4, elements, dtype=torch.float64)
    sizes = torch.rand(number, generator=generator).add(0.1).double()
    costs = 10 ** (-4 * torch.rand(number, generator=generator).double())
    return [decay * size for size in sizes], costs.tolist()


def used(bits: list[Tensor], windowed: list[bool]) -> int:
    return sum(
        row_bytes(width_counts(b)) * (HELD if narrow else CONTEXT)
        for b, narrow in zip(bits, windowed, strict=True)
    )


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("bytes_of_a_token", [3, 12, 40, 150])
def test_no_other_set_of_windows_is_better(seed: int, bytes_of_a_token: int) -> None:
    number = 6
    spectra, costs = layers(seed, number)
    budget = bytes_of_a_token * CONTEXT
    found = choose(spectra, costs, [CONTEXT] * number, HELD, budget)
    assert used(found.bits, found.windowed) <= budget
    lost = sum(cost for cost, narrow in zip(costs, found.windowed, strict=True) if narrow)
    assert found.divergence == pytest.approx(lost + expected_divergence(spectra, found.bits))
    every = (
        with_windows(spectra, costs, [CONTEXT] * number, HELD, list(choice), budget)
        for choice in itertools.product([False, True], repeat=number)
    )
    assert found.divergence == pytest.approx(min(one.divergence for one in every if one is not None))


@pytest.mark.parametrize("level", [1e-6, 1e-5, 1e-4])
def test_bits_are_divided_by_one_price(level: float) -> None:
    """Brute force over the bits of three groups of eight like components, in two layers that hold 64 and 512 tokens."""
    groups, tokens = (0.9, 0.05, 0.4), (64, 512)
    spectra = [
        torch.tensor(groups[:2], dtype=torch.float64).repeat_interleave(8),
        torch.full((8,), groups[2], dtype=torch.float64),
    ]

    def size(a: int, b: int, c: int) -> int:
        return tokens[0] * (1 + a + b) + tokens[1] * (1 + c)

    at_price = _group_bits(at_level(spectra, level, ANY, tokens))
    found = allocate(spectra, budget := size(*at_price), tokens=tokens)
    best = min(
        sum(8 * group * DISTORTION[bits] for group, bits in zip(groups, choice, strict=True))
        for choice in itertools.product(range(9), repeat=3)
        if size(*choice) <= budget
    )
    assert at_price[0] > 0
    assert expected_divergence(spectra, found) == pytest.approx(best)


def _group_bits(bits: list[Tensor]) -> tuple[int, int, int]:
    return int(bits[0][0]), int(bits[0][8]), int(bits[1][0])


def test_a_layer_that_holds_less_has_more_bits() -> None:
    [spectrum], _ = layers(0, 1)
    few, many = allocate([spectrum, spectrum], 20 * CONTEXT, tokens=[HELD, CONTEXT])
    assert int(few.sum()) > int(many.sum())


def test_windows_follow_their_cost_and_the_budget() -> None:
    spectra, _ = layers(0, 4)
    spectra = [spectra[0]] * 4
    costs: list[float | None] = [1e-5, 10.0, None, 1e-5]
    found = choose(spectra, costs, [CONTEXT] * 4, HELD, 60 * CONTEXT)
    assert found.windowed == [True, False, False, True]
    rich = choose(spectra, [1e-2] * 4, [CONTEXT] * 4, HELD, 10**9)
    assert rich.windowed == [False] * 4
    divergences = [
        choose(spectra, costs, [CONTEXT] * 4, HELD, b * CONTEXT).divergence for b in (8, 16, 32, 64)
    ]
    assert divergences == sorted(divergences, reverse=True)
