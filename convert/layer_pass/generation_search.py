"""Finds the smallest budget whose conversion writes as its donor does, within a tolerance on its own text.

    closed forms on held-out text say where to begin ▸ convert whole and measure what it writes
    ▸ scale the closed forms by that, then interpolate between conversions ▸ until the smallest within is found

Only a whole conversion can write, so few are made: the search ends with one that uses most of the tolerance, one that
is little above a budget that misses, or after MOST_CONVERSIONS. Then the smallest that was measured within is taken.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ..recipe.tolerance import Tolerance
from .loss_curve import SAFETY_FACTOR, STEP_UP, Point, points, round_up, smallest_budget_within

MOST_CONVERSIONS = 6  # before the search takes what it has; one more where that is not the last
# A conversion that uses this fraction of the tolerance is small enough: over forty prompts the rest is noise.
CLOSE = 0.9
LEAST = 1e-12  # nats a token; what is measured may be below 0 by rounding
MARGIN = 0.1  # of the way, in logarithms, between two budgets: how near to either the next may be


def following(
    state: Mapping[str, Any], target: Tolerance, ends: tuple[float, float], size: Callable[[float], int]
) -> float | None:
    """The budget to convert next; None where the last conversion is the answer, or the largest one that misses.

    Args:
        state: `looked` and `tried` of a search, of which at least one was tried.
        target: on the text that the model writes.
        ends: the smallest and the largest budget that the donor can have.
        size: cache elements a token at a budget; budgets of one size give one conversion.
    """
    tried, last = state["tried"], state["tried"][-1]["kv_budget"]
    values = {one["kv_budget"]: one["measured"] for one in tried}  # of the same budget the last
    within = [budget for budget, value in values.items() if value <= target.limit]
    best = min(within, default=None)
    missed = max((budget for budget in values if best is None or budget < best), default=None)
    if best is not None and _settled(values[best], missed, best, len(tried), target):
        return None if best == last else best
    low = ends[0] if missed is None else missed
    high = ends[1] if best is None else best
    wanted = _wanted(state, values, target, missed, best)
    taken = {size(budget) for budget in values}
    found = _untaken(wanted, low, high, taken, size)
    return best if found is None and best != last else found


def _settled(value: float, missed: float | None, best: float, conversions: int, target: Tolerance) -> bool:
    """Whether the budget `best`, which was measured within, is as small as can be told."""
    close = target.beyond(value) >= CLOSE * target.allowed
    beside = missed is not None and best <= missed * (1 + STEP_UP)
    return close or beside or conversions >= MOST_CONVERSIONS


def _wanted(
    state: Mapping[str, Any],
    values: Mapping[float, float],
    target: Tolerance,
    missed: float | None,
    best: float | None,
) -> float:
    """The budget at which the loss is estimated to be as large as allowed, kept away from those that are known."""
    goal = SAFETY_FACTOR * target.allowed
    # A small conversion that was within although a larger one missed leaves the larger one out:
    known = [
        (b, target.beyond(v))
        for b, v in sorted(values.items())
        if best is None or b <= best or v <= target.limit
    ]
    curve = known if len(known) > 1 else _scaled(points(state["looked"], target.held_out), known[0])
    wanted = smallest_budget_within(curve, goal)
    if missed is not None and best is not None:
        margin = (best / missed) ** MARGIN
        return min(max(wanted, missed * margin), best / margin)
    if missed is None:
        return min(wanted, float(best or 1.0) / (1 + STEP_UP))
    return max(wanted, missed * (1 + STEP_UP * 2 ** (len(state["tried"]) - 1)))


def _scaled(curve: list[Point], measured: Point) -> list[Point]:
    """The closed forms' losses, times what the measured one is of theirs at its budget."""
    budget, loss = measured
    curve = [point for point in curve if point[0] < 1.0] or curve  # the whole budget's is 0, on no such line
    factor = max(loss, LEAST) / _at(curve, budget)
    return [(share, value * factor) for share, value in curve]


def _at(curve: list[Point], budget: float) -> float:
    """The loss at `budget`, log-linear between the budgets of `curve`, and that of its end beyond them."""
    shares, losses = zip(
        *((math.log(share), math.log(max(loss, LEAST))) for share, loss in curve), strict=True
    )
    return math.exp(np.interp(math.log(budget), shares, losses))


def _untaken(
    wanted: float, low: float, high: float, taken: set[int], size: Callable[[float], int]
) -> float | None:
    """The budget nearest to `wanted`, from `low` to `high`, whose size is none of `taken`; None where all are."""
    steps = math.ceil(math.log(high / low) / math.log(1 + STEP_UP))
    spread = {round_up(min(low * (1 + STEP_UP) ** step, high)) for step in range(steps + 1)}
    nearest = sorted(spread | {low, high}, key=lambda budget: abs(math.log(budget / wanted)))
    choices = (round_up(min(max(wanted, low), high)), *nearest)
    return next((budget for budget in choices if low <= budget <= high and size(budget) not in taken), None)
