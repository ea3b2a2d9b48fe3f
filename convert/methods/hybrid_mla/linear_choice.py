"""Which layers become linear, and how many bits each component of the others has, under one budget in bytes. Pure.

A linear layer costs what its replacement alone does to the predictions; the others cost what their codes do. All costs
are nats a token, and are added up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..mla.bit_allocation import ANY, allocate, expected_divergence


@dataclass(frozen=True)
class LinearChoice:
    """A choice for every layer.

    Attributes:
        linear: the layers that are, ascending.
        bits: of each layer's components, int64; none in linear layers.
        divergence: expected of both, nats a token.
    """

    linear: tuple[int, ...]
    bits: list[Tensor]
    divergence: float


def choose(
    spectra: Sequence[Tensor],
    costs: Sequence[float | None],
    count: int,
    budget: float,
    widths: Sequence[int] = ANY,
) -> LinearChoice:
    """The `count` layers whose being linear, with the codes of the others, costs least.

    From the cheapest ones on, one is exchanged for another while that is better.

    Args:
        spectra: for each layer (n,), the divergence that leaving out each component adds, nats a token.
        costs: of each layer's being linear, nats a token; None: it is not.
        budget: bytes of a token's codes in all layers that have some.
        widths: bits that a component may have.
    """
    known = {index: cost for index, cost in enumerate(costs) if cost is not None}
    best = with_linear(spectra, costs, sorted(known, key=known.__getitem__)[:count], budget, widths)
    again = True
    while again:
        again = False
        for out in best.linear:
            for index in known.keys() - set(best.linear):
                codes = best.divergence - sum(known[each] for each in best.linear)
                if known[index] - known[out] >= codes:
                    continue  # more than all codes together cost
                other = [index if each == out else each for each in best.linear]
                found = with_linear(spectra, costs, other, budget, widths)
                if found.divergence < best.divergence:
                    best, again = found, True
                    break
    return best


def with_linear(
    spectra: Sequence[Tensor],
    costs: Sequence[float | None],
    linear: Sequence[int],
    budget: float,
    widths: Sequence[int] = ANY,
) -> LinearChoice:
    """The bits of all other layers when those in `linear` are."""
    coded = [index for index in range(len(spectra)) if index not in set(linear)]
    own = [spectra[index] for index in coded]
    found = allocate(own, budget, widths)
    bits = [torch.zeros(len(spectrum), dtype=torch.int64) for spectrum in spectra]
    for index, each in zip(coded, found, strict=True):
        bits[index] = each
    lost = sum(costs[index] or 0.0 for index in linear)
    return LinearChoice(tuple(sorted(linear)), bits, lost + expected_divergence(own, found))
