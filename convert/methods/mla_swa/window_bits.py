"""Which layers see a window, and how many bits each component of each layer has, under one budget in bytes. Pure.

A token of a windowed layer is held for a part of the text only, so that its bytes cost that part of what they cost in a
full layer, and the same price of a byte buys it more bits. With the price λ each layer is what is least in

    full:      Σ D(bits) + λ · bytes · context
    windowed:  what the window costs + Σ D(bits) + λ · bytes · (the tokens it holds)

Source: H. Everett, Generalized Lagrange multiplier method, Operations Research 11 (1963).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..mla.bit_allocation import ANY, allocate, at_level, expected_divergence, most_bytes

PRICES = 96  # tried, between one that buys all bits and one that buys none
GAIN_BITS = 8  # of a token's row beside its components'


@dataclass(frozen=True)
class WindowedBits:
    """A choice for every layer.

    Attributes:
        bits: of its components, int64.
        windowed: whether it sees a window.
        divergence: expected of both, nats a token.
    """

    bits: list[Tensor]
    windowed: list[bool]
    divergence: float


def choose(
    spectra: Sequence[Tensor],
    costs: Sequence[float | None],
    full: Sequence[int],
    windowed: int,
    budget: float,
    widths: Sequence[int] = ANY,
) -> WindowedBits:
    """The layers and bits of least expected divergence that `budget` pays for.

    Args:
        spectra: for each layer (n,), the divergence that leaving out each component adds, nats a token.
        costs: of windowing each layer, nats a token; None: it stays as it is.
        full: tokens that each layer holds if it stays as it is.
        windowed: tokens that a windowed layer holds.
        budget: bytes of the whole text.
        widths: bits that a component may have.
    """
    best: WindowedBits | None = None
    tried: set[tuple[bool, ...]] = set()

    def improved(choice: list[bool]) -> bool:
        nonlocal best
        if tuple(choice) in tried:
            return False
        tried.add(tuple(choice))
        found = with_windows(spectra, costs, full, windowed, choice, budget, widths)
        if found is None or (best is not None and found.divergence >= best.divergence):
            return False
        best = found
        return True

    improved([cost is not None for cost in costs])
    for choice in _priced(spectra, costs, full, windowed, widths):
        improved(choice)
    assert best is not None, "the smallest codes in windows exceed the budget"
    again = True
    while again:  # prices reach choices on the convex hull alone
        again = False
        for index in [i for i, cost in enumerate(costs) if cost is not None]:
            other = list(best.windowed)
            other[index] = not other[index]
            again = improved(other) or again
    return best


def with_windows(
    spectra: Sequence[Tensor],
    costs: Sequence[float | None],
    full: Sequence[int],
    windowed: int,
    choice: Sequence[bool],
    budget: float,
    widths: Sequence[int] = ANY,
) -> WindowedBits | None:
    """The bits that `budget` pays for when the layers of `choice` see a window; None where it does not pay for it."""
    tokens = [windowed if narrow else whole for narrow, whole in zip(choice, full, strict=True)]
    if most_bytes(1, 1, min(widths)) * sum(tokens) > budget:
        return None
    bits = allocate(spectra, budget, widths, tokens)
    lost = sum(cost or 0.0 for cost, narrow in zip(costs, choice, strict=True) if narrow)
    return WindowedBits(bits, list(choice), lost + expected_divergence(spectra, bits))


def _priced(
    spectra: Sequence[Tensor],
    costs: Sequence[float | None],
    full: Sequence[int],
    windowed: int,
    widths: Sequence[int],
) -> list[list[bool]]:
    """What each of several prices makes of the layers."""
    highest = max(float(spectrum.max()) for spectrum in spectra) or 1.0
    choices = []
    for level in torch.logspace(-12, 1, PRICES, dtype=torch.float64).mul(highest / max(full)).tolist():
        sides = []
        for tokens in (full, [windowed] * len(full)):
            bits = at_level(spectra, level, widths, tokens)
            sides.append(
                [
                    expected_divergence([spectrum], [b]) + level * t * (GAIN_BITS + float(b.sum()))
                    for spectrum, b, t in zip(spectra, bits, tokens, strict=True)
                ]
            )
        choices.append(
            [
                cost is not None and cost + narrow < whole
                for cost, whole, narrow in zip(costs, *sides, strict=True)
            ]
        )
    return choices
