"""A budget of cache elements divided over layers by what each of them needs. Pure: no torch, no weights."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

EXACT = 1e-9  # a relative error below it counts as this


@dataclass(frozen=True)
class LayerNeed:
    """What a survey found of one layer.

    shares: of the donor's cache elements, increasing; errors: the relative error of the attention output that a closed
    form makes at each. divergence: KL(donor ‖ donor with this layer alone converted), nats a token, at `probed`, one
    of the shares.
    """

    shares: Sequence[float]
    errors: Sequence[float]
    probed: float
    divergence: float

    def divergence_at(self, share: float) -> float:
        """The divergence is taken to follow the error, and the error's logarithm to be piecewise linear."""
        known = [math.log(max(error, EXACT)) for error in self.errors]
        at_probe = known[list(self.shares).index(self.probed)]
        return self.divergence * math.exp(_interpolated(share, self.shares, known) - at_probe)


def divide(
    needs: Sequence[LayerNeed], total: int, least: int | Sequence[int], most: int, unit: int, whole: int
) -> list[int]:
    """Elements for each layer, `total` in all, that make the sum of the layers' divergences small.

    Every layer gets from `least`, which may be a number for each, to `most`; the rest goes, `unit` elements at a time,
    to the layer whose divergence falls most, and of equals to the smaller. whole: the donor's elements a layer.
    """
    elements = [least] * len(needs) if isinstance(least, int) else list(least)
    left = total - sum(elements)
    assert 0 <= left <= most * len(needs) - sum(elements)

    def gain(layer: int) -> tuple[float, int, int, int]:
        step = min(unit, most - elements[layer], left)
        before, after = (
            needs[layer].divergence_at(n / whole) for n in (elements[layer], elements[layer] + step)
        )
        return ((after - before) / step if step else 0.0, elements[layer], layer, step)

    queue = [gain(layer) for layer in range(len(needs))]
    heapq.heapify(queue)
    while left:
        _, _, layer, step = heapq.heappop(queue)
        step = min(step, left)
        elements[layer] += step
        left -= step
        if elements[layer] < most and left:
            heapq.heappush(queue, gain(layer))
    return elements


def _interpolated(x: float, points: Sequence[float], values: Sequence[float]) -> float:
    """Piecewise linear through the points; the outer pieces go on."""
    if len(points) == 1:
        return values[0]
    last = next((i for i in range(1, len(points) - 1) if x <= points[i]), len(points) - 1)
    (x0, x1), (y0, y1) = points[last - 1 : last + 1], values[last - 1 : last + 1]
    return y0 + (y1 - y0) * (x - x0) / (x1 - x0)
