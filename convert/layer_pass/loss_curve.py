"""The loss at measured budgets, and the budget at which it is as large as is allowed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ..recipe.tolerance import Tolerance

# A search aims at this fraction of the tolerance, so that the conversion seldom misses:
SAFETY_FACTOR = 0.95
REACH = 1.5  # the answer lies within this factor of the measured budgets
MIN_LOSS = 1e-3  # fraction of the allowed loss; a smaller loss counts as this
# The same for the larger of two budgets that are interpolated, as the loss falls to 0 at once at the whole budget:
MIN_INTERPOLATED_LOSS = 0.25
STEP_UP = 0.05  # a miss raises the budget by at least this fraction; each further miss doubles it

Point = tuple[float, float]  # budget, and loss: how far beyond the donor the conversion was measured


def points(
    measurements: Sequence[dict[str, Any]], target: Tolerance, full_recipe: bool = False
) -> list[Point]:
    """(budget, loss) from the smallest budget up.

    full_recipe: only measurements with the recipe's own effort and text, without the closed forms of the grid.
    """
    kept = (one for one in measurements if one.get("as_asked", True) or not full_recipe)
    return sorted((one["kv_budget"], target.beyond(one["measured"])) for one in kept)


def smallest_budget_within(losses: Sequence[Point], allowed: float) -> float:
    """The budget from which on the loss is at most `allowed`, by log-linear interpolation; at most 1.

    losses: from the smallest budget up; they need not fall all the way, as small differences are noise. Beyond the
    measured budgets the line through the nearest two is followed, by REACH at most.
    """
    logs = [(math.log(b), math.log(min(max(x / allowed, MIN_LOSS), 1 / MIN_LOSS))) for b, x in losses]
    too_large = [index for index, (_, height) in enumerate(logs) if height > 0]
    first = too_large[-1] + 1 if too_large else 0  # from it on all are within the limit
    if first == 0:
        pair, lowest, highest = logs[:2], logs[0][0] - math.log(REACH), logs[0][0]
    elif first == len(logs):
        pair, lowest, highest = logs[-2:], logs[-1][0], logs[-1][0] + math.log(REACH)
    else:
        pair = [logs[first - 1], (logs[first][0], max(logs[first][1], math.log(MIN_INTERPOLATED_LOSS)))]
        lowest, highest = pair[0][0], pair[1][0]
    (b0, h0), (b1, h1) = pair[0], pair[-1]
    answer = b0 + h0 / (h0 - h1) * (b1 - b0) if h1 < h0 else math.inf
    return math.exp(min(max(answer, lowest), highest, 0.0))


def round_up(budget: float) -> float:
    """Rounded up to a thousandth."""
    return min(1.0, math.ceil(1000 * budget - 1e-6) / 1000)
