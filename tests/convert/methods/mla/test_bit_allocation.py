"""Bits under one budget: as good as brute force, where the variance is, and never more bytes than asked."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mhconvert.convert.methods.layer_sensitivity import LayerSensitivity
from mhconvert.convert.methods.mla.bit_allocation import (
    allocate,
    expected_divergence,
    least_bytes,
    width_counts,
)
from mhconvert.convert.methods.mla.code_basis import code_basis
from mhconvert.convert.methods.mla.coded_method import CodedMLA
from mhconvert.convert.methods.mla.latent_code import WIDTHS, row_bytes
from mhconvert.convert.methods.mla.settings import MLASettings
from mhconvert.errors import BudgetError
from tests.donors import make_config


def spent(bits: list[torch.Tensor]) -> int:
    return sum(row_bytes(width_counts(each)) for each in bits)


EQUAL = (
    16  # components of one divergence: their bits fill whole bytes, so that rounding rows up plays no part
)


@given(
    st.lists(st.floats(1e-4, 1.0), min_size=6, max_size=6, unique=True),
    st.integers(10, 80),
)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_the_search_is_as_good_as_brute_force(spectrum: list[float], budget: int) -> None:
    """Over every assignment of 0 to 8 bits to six groups of components in two layers, at the bytes that are used."""
    spectra = [
        torch.tensor(part, dtype=torch.float64).repeat_interleave(EQUAL)
        for part in (spectrum[:3], spectrum[3:])
    ]
    chosen = allocate(spectra, budget)
    used = spent(chosen)
    assume(all(int(each.sum()) > 1 for each in chosen))  # a layer's one bit may be there whatever it saves
    assert budget - 2 < used <= budget  # a group's bit more takes two bytes
    least: list[dict[int, float]] = [{}, {}]  # by layer: bytes of a row -> the smallest divergence
    for bits in product(range(9), repeat=3):
        groups = torch.tensor(bits).repeat_interleave(EQUAL)
        for costs, each in zip(least, spectra, strict=True):
            size, cost = spent([groups]), expected_divergence([each], [groups])
            costs[size] = min(cost, costs.get(size, cost))
    best = min(least[0][a] + least[1][b] for a, b in product(*least) if a + b <= used)
    assert expected_divergence(spectra, chosen) <= best * (1 + 1e-9)


def test_bits_fall_where_the_divergence_falls() -> None:
    spectra = [
        torch.logspace(0, -6, 40, dtype=torch.float64),
        torch.logspace(-2, -8, 40, dtype=torch.float64),
    ]
    bits = allocate(spectra, 60)
    for each in bits:
        assert (each.diff() <= 0).all()
    assert bits[0].sum() > bits[1].sum()
    assert 0.9 * 60 <= spent(bits) <= 60


@pytest.mark.parametrize("budget", [10, 20, 40, 60])
def test_more_bytes_never_cost_more(budget: int) -> None:
    generator = torch.Generator().manual_seed(3)
    spectra = [torch.rand(50, generator=generator, dtype=torch.float64) ** 4 for _ in range(3)]
    costs = [expected_divergence(spectra, allocate(spectra, size)) for size in (budget, 2 * budget)]
    assert costs[1] < costs[0]


@pytest.mark.parametrize("width", range(2, 9))
def test_one_width_for_the_components_that_have_bits(width: int) -> None:
    """They are those of the largest divergence, as many as the bytes hold, in both layers under one level."""
    generator = torch.Generator().manual_seed(width)
    spectra = [scale * torch.rand(80, generator=generator, dtype=torch.float64) for scale in (1.0, 0.9)]
    bits = allocate(spectra, 30, (width,))
    assert {int(each) for each in torch.cat(bits).unique()} == {0, width}
    assert 24 <= spent(bits) <= 30  # fields of a width are rounded up to bytes, so the last step may be large
    joined, chosen = torch.cat(spectra), torch.cat(bits) > 0
    assert joined[chosen].min() > joined[~chosen].max()
    least = 2 * row_bytes([int(each == width) for each in WIDTHS])
    with pytest.raises(
        BudgetError, match=rf"at least {least} bytes in 2 layers, and the budget gives {least - 1}"
    ):
        allocate(spectra, least - 1, (width,))


def test_a_budget_below_the_least_is_refused_with_the_least() -> None:
    spectra = [torch.ones(4, dtype=torch.float64)] * 5
    assert least_bytes(5) == 10
    assert spent(allocate(spectra, 10)) == 10
    with pytest.raises(BudgetError, match=r"at least 10 bytes in 5 layers, and the budget gives 9"):
        allocate(spectra, 9)


def test_the_basis_decorrelates_and_its_components_cost_what_they_say() -> None:
    generator = torch.Generator().manual_seed(0)
    mixing, paying = (torch.randn(12, 12, generator=generator, dtype=torch.float64) for _ in range(2))
    mean = torch.randn(12, generator=generator, dtype=torch.float64)
    covariance, price = mixing @ mixing.mT, paying @ paying.mT
    layer = LayerSensitivity(mean, covariance, price, torch.tensor(10**9))
    basis = code_basis(layer)
    identity = torch.eye(12, dtype=torch.float64)
    torch.testing.assert_close(basis.down @ covariance @ basis.down.mT, identity, atol=1e-6, rtol=0)
    torch.testing.assert_close(basis.up @ basis.down, identity, atol=1e-8, rtol=0)
    # Without the ridge the divergences add up to the cost of leaving out everything.
    whole = 0.5 * torch.trace(price @ covariance)
    assert whole < basis.divergence.sum() < 1.5 * whole
    assert (basis.divergence.diff() <= 0).all()


def test_a_budget_is_named_as_the_user_gave_it() -> None:
    with pytest.raises(
        BudgetError, match=r"kv_budget=0\.001 gives 0 bytes a token, .* at least 4 in 2 layers"
    ):
        CodedMLA(make_config(), MLASettings(kv_budget=0.001), "quick")
