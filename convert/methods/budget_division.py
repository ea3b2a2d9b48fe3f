"""Divides a budget of cache elements over the layers by what each of them needs. Pure: no torch, no weights."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

EXACT = 1e-9  # smaller relative errors are counted as this one, whose logarithm is finite


@dataclass(frozen=True)
class LayerNeed:
    """What a survey measured of one layer.

    Attributes:
        shares: budgets of the layer as shares of the donor's cache elements, increasing.
        errors: at each of them, the relative squared error of the attention output after the closed form.
        probed: the one of `shares` at which `divergence` was measured.
        divergence: of the predictions with this layer alone converted from the donor's, nats per token, as it is
            estimated for a small change.
        free: (share, error) of the same layer without a constraint that `errors` were measured under; empty: none.
    """

    shares: Sequence[float]
    errors: Sequence[float]
    probed: float
    divergence: float
    free: Sequence[Sequence[float]] = ()

    def divergence_at(self, share: float) -> float:
        """The divergence expected at `share`, nats per token.

        It is taken to be proportional to the error, and the error's logarithm to be piecewise linear in the share.
        """
        logs = [math.log(max(error, EXACT)) for error in self.errors]
        at_probe = logs[list(self.shares).index(self.probed)]
        return self.divergence * math.exp(_interpolated(share, self.shares, logs) - at_probe)

    def unconstrained(self) -> LayerNeed:
        """The need of the same layer without the constraint; its divergence is in proportion to its error.

        The whole share is the donor's layer, without an error.
        """
        shares, errors = ([pair[part] for pair in self.free] for part in (0, 1))
        nearest = min(shares, key=lambda share: abs(share - self.probed))
        ratio = errors[shares.index(nearest)] / max(self.errors[list(self.shares).index(self.probed)], EXACT)
        if shares[-1] < 1:
            shares, errors = [*shares, 1.0], [*errors, 0.0]
        return LayerNeed(shares, errors, nearest, self.divergence * ratio)


def predicted(needs: Sequence[LayerNeed], elements: Sequence[int], whole: int) -> float:
    """The sum of the divergences of layers that have `elements` of `whole` each, nats per token."""
    return sum(need.divergence_at(n / whole) for need, n in zip(needs, elements, strict=True))


def divide(
    needs: Sequence[LayerNeed], total: int, least: int | Sequence[int], most: int, unit: int, whole: int
) -> list[int]:
    """The elements of each layer, `total` in all, chosen greedily so that the sum of the divergences is small.

    Every layer starts with its least number. The rest is given out `unit` elements at a time, each time to the layer
    whose divergence falls most per element; of equals, to the one that has fewer.

    Args:
        needs: one for each layer.
        total: elements of all layers together.
        least: of any layer, or of each.
        most: of any layer.
        unit: elements given out at a time.
        whole: the donor's elements per layer.
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


def divide_in_levels(needs: Sequence[LayerNeed], total: int, levels: Sequence[int], whole: int) -> list[int]:
    """The elements of each layer, one of `levels` each and at most `total` in all, of least total divergence.

    Exact: for each number of layers and each sum of elements the best division is kept.

    Args:
        needs: one for each layer.
        total: at least the least of `levels` for each layer.
        levels: ascending.
        whole: the donor's elements per layer.
    """
    assert levels[0] * len(needs) <= total
    best: dict[int, tuple[float, list[int]]] = {0: (0.0, [])}
    for index, need in enumerate(needs):
        costs = [need.divergence_at(level / whole) for level in levels]
        room = total - levels[0] * (len(needs) - index - 1)
        grown: dict[int, tuple[float, list[int]]] = {}
        for used, (lost, chosen) in best.items():
            for level, cost in zip(levels, costs, strict=True):
                known = grown.get(used + level)
                if used + level <= room and (known is None or lost + cost < known[0]):
                    grown[used + level] = (lost + cost, [*chosen, level])
        best = grown
    return min(best.items(), key=lambda item: (item[1][0], item[0]))[1][1]


def raised(numbers: Sequence[int], least: Sequence[int], step: int = 1) -> list[int]:
    """Numbers of the same sum, none of them smaller than its least; moved `step` at a time."""
    changed = [max(n, some) for n, some in zip(numbers, least, strict=True)]
    while sum(changed) > sum(numbers):
        index = max(range(len(changed)), key=lambda i: changed[i] - least[i])
        changed[index] -= step
    return changed


def _interpolated(x: float, points: Sequence[float], values: Sequence[float]) -> float:
    """The piecewise linear function through the points, extrapolated by its outer pieces."""
    if len(points) == 1:
        return values[0]
    last = next((i for i in range(1, len(points) - 1) if x <= points[i]), len(points) - 1)
    (x0, x1), (y0, y1) = points[last - 1 : last + 1], values[last - 1 : last + 1]
    return y0 + (y1 - y0) * (x - x0) / (x1 - x0)
