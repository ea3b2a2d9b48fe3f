"""Finds the smallest budget whose conversion stays within a tolerance on the held-out rows.

    closed forms over a grid ▸ the recipe's own fit at two budgets near the answer ▸ interpolate
    ▸ convert and measure ▸ where that misses, a larger budget

The closed form overstates what a fitted conversion loses, but it is cheap and says where to look. Only the
measured conversion counts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from mhconvert.errors import BudgetError
from mhconvert.progress import Progress

from ..calibration.calibration_rows import Rows
from ..methods.registry import Method, build_method
from ..recipe.recipe import Recipe
from ..recipe.tolerance import Tolerance, parse
from . import budget_curve, layer_steps
from .context import ConversionContext
from .resumable_run import Workspace

GRID = (1 / 16, 1 / 8, 3 / 16, 1 / 4, 3 / 8, 1 / 2, 3 / 4, 1.0)  # where closed forms are measured
LOOK_TOKENS = 8192  # of the calibration text that they see where a fit follows
NEAR = (0.7, 0.9)  # of the budget that the closed form needs: where the fit is measured
AIM = 0.95  # of the tolerance: what the interpolation aims at, so that the conversion seldom misses
REACH = 1.5  # how far beyond the measured budgets the answer may lie
NEGLIGIBLE = 1e-3  # of the aim: damage below it counts as this
STEEPEST = (
    0.25  # of the aim, likewise, between two budgets: at the whole budget the damage falls to 0 at once
)
STEP_UP = 0.05  # of the budget: the least that a miss adds; each further miss doubles it

Point = tuple[float, float]  # budget, and how far beyond the donor it was measured
Attempt = Callable[
    [ConversionContext], tuple[Method, dict[str, Any]]
]  # converts all layers: method and report


def convert_within_tolerance(
    context: ConversionContext, space: Workspace, attempt: Attempt
) -> tuple[Recipe, Method, dict[str, Any]]:
    """Convert at the budget that a search gives, and at larger ones as long as the measured result misses.

    Args:
        context: its recipe has a tolerance.
        space: the run's folder, which keeps the search's answer for a resumed run.
        attempt: converts into `space`.

    Returns:
        The recipe that was converted, its method, and the report with the search in it.

    Raises:
        BudgetError: Not even the whole budget is near enough.
    """
    recipe = context.recipe
    target = parse(str(recipe.tolerance))
    if space.search is None:
        space.search = find_budget(context)
    while True:
        state = space.search
        budget, settled = state["kv_budget"], recipe.at_budget(state["kv_budget"])
        method, report = attempt(context.with_recipe(settled))
        measured = target.value(report)
        state = state | {"tried": [*state["tried"], {"kv_budget": budget, "measured": measured}]}
        if target.met(report):
            return settled, method, report | {"tolerance": state | {"measured": measured}}
        if budget >= 1:
            raise _out_of_reach(target, measured)
        larger = step_up(state, target)
        while larger < 1 and _planned_elements(context, larger) == _planned_elements(context, budget):
            larger = round_up(larger * (1 + STEP_UP))  # where heads are few, some budgets come to the same
        message = f"budget {budget:g} measured {measured:.4g}: now {larger:g}"
        context.on_progress(Progress("search", 1, 1, message))
        space.start_over(state | {"kv_budget": larger})


def _planned_elements(context: ConversionContext, budget: float) -> int:
    """Cache elements a token of a conversion at `budget`."""
    recipe = context.recipe.at_budget(budget)
    return build_method(recipe.method, context.donor.config, recipe.settings, recipe.effort).kv_elements()


def find_budget(context: ConversionContext) -> dict[str, Any]:
    """The budget to convert with first, and all that was measured to choose it; JSON types.

    `looked` has each budget, its measured value, and whether it was measured `as_asked`, with the recipe's own effort
    and text. Raises BudgetError when the whole budget was measured as asked and is not near enough.
    """
    recipe, rows = context.recipe, context.rows
    target = parse(str(recipe.tolerance))
    aim, fits = AIM * target.allowed, layer_steps.fit_steps(recipe) > 0
    grid = budget_curve.expressible(recipe, context.donor, GRID)
    plain = context
    if fits:
        seen = max(1, LOOK_TOKENS // rows.fit.shape[1])
        closed_form = replace(recipe, effort="quick", fit_steps=0)
        plain = replace(context, recipe=closed_form, rows=Rows(rows.fit[:seen], rows.held_out))
    looked = _measured(plain, grid, as_asked=not fits)
    budget = crossing(points(looked, target), aim)
    if fits:
        shares = NEAR if budget < 1 else (NEAR[1], 1.0)
        near = sorted({round_up(max(grid[0], share * budget)) for share in shares})
        looked += _measured(context, near, as_asked=True)
        budget = crossing(points(looked, target, as_asked=True), aim)
        while grid[0] < budget < near[0] / REACH * 1.001:  # the fit saves more than was expected
            near = [round_up(budget)]
            looked += _measured(context, near, as_asked=True)
            budget = crossing(points(looked, target, as_asked=True), aim)
    whole = [one["measured"] for one in looked if one["as_asked"] and one["kv_budget"] == 1]
    if whole and target.beyond(whole[-1]) > target.allowed:
        raise _out_of_reach(target, whole[-1])
    budget = round_up(max(grid[0], budget))
    return {"asked": str(target), "kv_budget": budget, "looked": looked, "tried": []}


def _measured(
    context: ConversionContext, budgets: Sequence[float], *, as_asked: bool
) -> list[dict[str, Any]]:
    """The tolerance's measure at each budget, from one pass that writes nothing."""
    target = parse(str(context.recipe.tolerance))
    kind = "fits" if layer_steps.fit_steps(context.recipe) else "closed forms"

    def listen(event: Progress) -> None:
        context.on_progress(Progress("search", event.done, event.total, f"{kind} at {len(budgets)} budgets"))

    recipes = [context.recipe.at_budget(share) for share in budgets]
    traced = budget_curve.trace(replace(context, on_progress=listen), recipes)
    return [
        {"kv_budget": point["kv_budget"], "measured": target.value(point), "as_asked": as_asked}
        for point in traced["points"]
    ]


def points(measured: Sequence[dict[str, Any]], target: Tolerance, as_asked: bool = False) -> list[Point]:
    """(budget, damage) from the smallest budget up; as_asked: without the measurements that only say where to look."""
    kept = (one for one in measured if one.get("as_asked", True) or not as_asked)
    return sorted((one["kv_budget"], target.beyond(one["measured"])) for one in kept)


def crossing(measured: Sequence[Point], aim: float) -> float:
    """The budget from which on the damage is at most `aim`, by log-linear interpolation; at most 1.

    measured: from the smallest budget up; damage need not fall all the way, as small differences are noise. Beyond
    the measured budgets the nearest two go on, by REACH at most.
    """
    logs = [(math.log(b), math.log(min(max(d / aim, NEGLIGIBLE), 1 / NEGLIGIBLE))) for b, d in measured]
    too_much = [index for index, (_, height) in enumerate(logs) if height > 0]
    first = too_much[-1] + 1 if too_much else 0  # from it on all are within the aim
    if first == 0:
        pair, lowest, highest = logs[:2], logs[0][0] - math.log(REACH), logs[0][0]
    elif first == len(logs):
        pair, lowest, highest = logs[-2:], logs[-1][0], logs[-1][0] + math.log(REACH)
    else:
        pair = [logs[first - 1], (logs[first][0], max(logs[first][1], math.log(STEEPEST)))]
        lowest, highest = pair[0][0], pair[1][0]
    (b0, h0), (b1, h1) = pair[0], pair[-1]
    answer = b0 + h0 / (h0 - h1) * (b1 - b0) if h1 < h0 else math.inf
    return math.exp(min(max(answer, lowest), highest, 0.0))


def step_up(state: dict[str, Any], target: Tolerance) -> float:
    """Return the budget after a miss: interpolated anew, at least one step larger, at most one known to be within."""
    failed, misses = state["kv_budget"], len(state["tried"])
    known = points([*state["looked"], *state["tried"]], target, as_asked=True)
    least = failed * (1 + STEP_UP * 2 ** (misses - 1))
    better = round_up(max(crossing(known, AIM * target.allowed), least))
    met = [budget for budget, damage in known if budget > failed and damage <= target.allowed]
    return min(better, *met[:1]) if met else better


def round_up(budget: float) -> float:
    """Rounded up to a thousandth."""
    return min(1.0, math.ceil(1000 * budget - 1e-6) / 1000)


def _out_of_reach(target: Tolerance, measured: float) -> BudgetError:
    """The error for a tolerance that the largest budget misses."""
    return BudgetError(
        f"no budget meets the tolerance {target}: with the largest KV budget that the settings allow the conversion "
        f"still measures {measured:.4g}; choose a larger tolerance, or other settings (dtype, profile, limits)"
    )
