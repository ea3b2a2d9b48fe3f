"""Dividing a budget: to the element, within bounds, and no worse than any other division."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mhconvert.convert.methods.budget_division import LayerNeed, divide, divide_in_levels, predicted

SHARES = (0.125, 0.3125, 0.5, 0.75)


def need(divergence: float, fall: float = 6.0) -> LayerNeed:
    """A layer whose error falls exponentially with its share."""
    return LayerNeed(SHARES, [2.0 ** (-fall * share) for share in SHARES], 0.3125, divergence)


needs = st.lists(st.builds(need, st.floats(0, 10), st.floats(0.5, 30)), min_size=1, max_size=8)


@given(needs, st.integers(1, 40), st.integers(0, 40), st.integers(1, 16), st.floats(0, 1))
def test_the_total_is_met_to_the_element(
    layers: list[LayerNeed], least: int, room: int, unit: int, filled: float
) -> None:
    total = least * len(layers) + int(filled * room * len(layers))
    elements = divide(layers, total, least, least + room, unit, whole=80)
    assert sum(elements) == total
    assert all(least <= count <= least + room for count in elements)


@pytest.mark.parametrize("divergences", [(1, 1, 1), (0.1, 1, 10), (5, 0.01, 0.01), (0, 0, 1)])
@pytest.mark.parametrize("falls", [(6, 6, 6), (3, 6, 12)])
def test_no_other_division_is_better(divergences: tuple[float, ...], falls: tuple[float, ...]) -> None:
    layers = [need(d, f) for d, f in zip(divergences, falls, strict=True)]

    def total(elements: tuple[int, ...]) -> float:
        return sum(layer.divergence_at(n / 64) for layer, n in zip(layers, elements, strict=True))

    found = divide(layers, 60, least=4, most=48, unit=4, whole=64)
    every = [e for e in itertools.product(range(4, 49, 4), repeat=3) if sum(e) == 60]
    assert total(tuple(found)) == pytest.approx(min(map(total, every)), rel=1e-9)


def test_layers_alike_get_alike_and_louder_ones_more() -> None:
    alike = divide([need(1.0)] * 4, 4 * 24, least=6, most=60, unit=2, whole=96)
    assert max(alike) - min(alike) <= 2
    quiet, loud = divide([need(0.1), need(1.0)], 60, least=6, most=60, unit=2, whole=96)
    # e = 2^(-6 n / 96): ten times the divergence is worth 16 · log2(10) = 53 elements between the two
    assert loud - quiet == pytest.approx(min(53, 48), abs=2)


def test_a_divergence_follows_the_error_between_and_beyond_the_shares() -> None:
    layer = need(0.5, fall=6.0)
    assert layer.divergence_at(0.3125) == pytest.approx(0.5)
    for share in (0.02, 0.2, 0.4, 0.6, 1.0):
        assert layer.divergence_at(share) == pytest.approx(0.5 * 2 ** (-6 * (share - 0.3125)))


def test_layers_that_need_nothing_get_the_same() -> None:
    assert (
        divide([LayerNeed((1.0,), (1.0,), 1.0, 0.0)] * 3, 60, least=5, most=50, unit=3, whole=96) == [20] * 3
    )


@given(
    st.lists(st.builds(need, st.floats(0, 10), st.floats(0.5, 30)), min_size=1, max_size=4),
    st.integers(8, 64),
)
def test_no_other_division_in_levels_is_better(layers: list[LayerNeed], total: int) -> None:
    levels = (2, 4, 8, 16)
    found = divide_in_levels(layers, total, levels, whole=16)
    assert sum(found) <= total
    every = [e for e in itertools.product(levels, repeat=len(layers)) if sum(e) <= total]
    assert predicted(layers, found, 16) == pytest.approx(
        min(predicted(layers, e, 16) for e in every), rel=1e-9
    )


def test_the_need_without_a_constraint_is_in_proportion_to_the_errors() -> None:
    layer = LayerNeed((0.25, 0.5), (0.4, 0.2), 0.25, 1.0, ((0.2, 0.3), (0.6, 0.1)))
    free = layer.unconstrained()
    assert (free.probed, free.divergence) == (0.2, pytest.approx(0.75))
    assert free.divergence_at(0.6) == pytest.approx(0.25)
    assert free.divergence_at(1.0) < 1e-6  # the donor's own layer
