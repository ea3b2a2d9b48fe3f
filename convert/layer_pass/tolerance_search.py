"""Finds the smallest budget whose conversion stays within a tolerance on the held-out rows.

    closed forms over a grid ▸ the recipe's own fit at two budgets near the answer ▸ interpolate
    ▸ convert and measure ▸ where that misses, a larger budget

The closed form overstates what a fitted conversion loses, but it is cheap and says where to look. Only the
measured conversion counts. On text that the result writes, the closed forms say where to begin (`generation_search`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from mhconvert.errors import BudgetError
from mhconvert.progress import Progress

from ..calibration.calibration_rows import Rows
from ..donor.donor import Donor
from ..methods.registry import Method, build_method
from ..recipe.recipe import Recipe
from ..recipe.tolerance import Tolerance, parse
from . import budget_curve, generation_search, layer_steps
from .context import ConversionContext
from .loss_curve import REACH, SAFETY_FACTOR, STEP_UP, points, round_up, smallest_budget_within
from .resumable_run import Workspace

# Budgets at which closed forms are measured, and the calibration tokens that they see where a fit follows:
GRID = (1 / 16, 1 / 8, 3 / 16, 1 / 4, 3 / 8, 1 / 2, 3 / 4, 1.0)
GRID_TOKENS = 8192
REFINE_FRACTIONS = (0.7, 0.9)  # the fit is measured at these fractions of the closed form's budget

Attempt = Callable[
    [ConversionContext], tuple[Method, dict[str, Any]]
]  # converts all layers: method and report


def least_row(recipe: Recipe, donor: Donor, method: Method) -> int:
    """Tokens that a calibration row needs: those of the smallest budget where the budget is searched."""
    if recipe.tolerance is None:
        return method.least_row
    smallest = recipe.at_budget(budget_curve.expressible(recipe, donor, GRID)[0])
    return build_method(recipe.method, donor.config, smallest.settings, recipe.effort).least_row


def convert_within_tolerance(
    context: ConversionContext, space: Workspace, attempt: Attempt
) -> tuple[Method, dict[str, Any]]:
    """Convert at the budget that a search gives, and at larger ones as long as the measured result misses.

    Args:
        context: its recipe has a tolerance.
        space: the run's folder, which keeps the search's answer for a resumed run.
        attempt: converts into `space`.

    Returns:
        The method at the budget that was taken, and the report with its recipe and the search in it.

    Raises:
        BudgetError: Not even the whole budget is near enough.
    """
    recipe = context.recipe
    target = parse(str(recipe.tolerance))
    if space.search is None:
        space.search = find_budget(context)
    while True:
        state = space.search
        budget = state["kv_budget"]
        method, report = attempt(context.with_recipe(recipe.at_budget(budget)))
        measured = target.measured(report)
        # On resume the prompts may be other ones, of which the earlier figures say nothing.
        tried = [one for one in state["tried"] if one.get("digest") == measured.get("digest")]
        state = state | {"tried": [*tried, {"kv_budget": budget} | measured]}
        following = (_another if target.on_policy else _larger)(context, state, target)
        if following is None:
            return method, report | {"tolerance": state | measured}
        message = f"budget {budget:g} measured {measured['measured']:.4g}: now {following:g}"
        context.on_progress(Progress("search", 1, 1, message))
        space.start_over(state | {"kv_budget": following})


def _larger(context: ConversionContext, state: dict[str, Any], target: Tolerance) -> float | None:
    """The budget after the last that was tried; None where that is within. Raises BudgetError at the largest."""
    budget, measured = state["kv_budget"], state["tried"][-1]["measured"]
    if measured <= target.limit:
        return None
    planned = _planned_elements(context, budget)
    if budget >= 1 or planned == _planned_elements(context, 1.0):
        raise _out_of_reach(target, measured)
    larger = step_up(state, target)
    while larger < 1 and _planned_elements(context, larger) == planned:
        larger = round_up(larger * (1 + STEP_UP))  # where heads are few, some budgets come to the same
    return larger


def _another(context: ConversionContext, state: dict[str, Any], target: Tolerance) -> float | None:
    """The same on the text that the model writes, from `generation_search`."""
    grid = budget_curve.expressible(context.recipe, context.donor, GRID)
    following = generation_search.following(
        state, target, (grid[0], grid[-1]), partial(_planned_elements, context)
    )
    if following is None and state["tried"][-1]["measured"] > target.limit:
        raise _out_of_reach(target, min(one["measured"] for one in state["tried"]))
    return following


def _planned_elements(context: ConversionContext, budget: float) -> int:
    """Cache elements a token of a conversion at `budget`."""
    return budget_curve.planned_elements(context.recipe.at_budget(budget), context.donor)


def find_budget(context: ConversionContext) -> dict[str, Any]:
    """The budget to convert with first, and all that was measured to choose it; JSON types.

    `looked` has each budget, its measured value, and whether it was measured `as_asked`, with the recipe's own effort
    and text. Raises BudgetError when the whole budget was measured as asked and is not near enough.
    """
    recipe, rows = context.recipe, context.rows
    asked = parse(str(recipe.tolerance))
    target, fits = asked.held_out, _fits(context)
    goal = SAFETY_FACTOR * target.allowed
    grid = _different(context, budget_curve.expressible(recipe, context.donor, GRID))
    most = grid[-1]  # larger budgets come to the same
    plain = context
    if fits:
        seen = max(1, GRID_TOKENS // rows.fit.shape[1])
        closed_form = replace(recipe, effort="quick", fit_steps=0)
        plain = replace(context, recipe=closed_form, rows=Rows(rows.fit[:seen], rows.held_out))
    measurements = _measured(plain, grid, full_recipe=not fits)
    budget = smallest_budget_within(points(measurements, target), goal)
    if fits and not asked.on_policy:
        budget = min(budget, most)
        fractions = REFINE_FRACTIONS if budget < most else (REFINE_FRACTIONS[1], 1.0)
        refined = _different(
            context, sorted({round_up(max(grid[0], fraction * budget)) for fraction in fractions})
        )
        measurements += _measured(context, refined, full_recipe=True)
        budget = smallest_budget_within(points(measurements, target, full_recipe=True), goal)
        while grid[0] < budget < refined[0] / REACH * 1.001:  # the fit saves more than was expected
            refined = [round_up(budget)]
            measurements += _measured(context, refined, full_recipe=True)
            budget = smallest_budget_within(points(measurements, target, full_recipe=True), goal)
    whole = [one["measured"] for one in measurements if one["as_asked"] and one["kv_budget"] >= most]
    if whole and target.beyond(whole[-1]) > target.allowed and not asked.on_policy:
        raise _out_of_reach(target, whole[-1])
    budget = round_up(min(max(grid[0], budget), most))
    return {"asked": str(asked), "kv_budget": budget, "looked": measurements, "tried": []}


def _fits(context: ConversionContext) -> bool:
    """Whether a conversion by the recipe trains anything, so that closed forms say less than the whole."""
    recipe = context.recipe
    method = build_method(recipe.method, context.donor.config, recipe.at_budget(1.0).settings, recipe.effort)
    rows, length = context.rows.fit.shape
    of_layers = layer_steps.layer_fit_steps(recipe, method, length)
    return of_layers > 0 or layer_steps.block_steps(recipe, rows, length) > 0


def _different(context: ConversionContext, budgets: Sequence[float]) -> list[float]:
    """`budgets`, ascending, without those that come to the size of a smaller one."""
    sizes: dict[int, float] = {}
    for budget in budgets:
        sizes.setdefault(_planned_elements(context, budget), budget)
    return list(sizes.values())


def _measured(
    context: ConversionContext, budgets: Sequence[float], *, full_recipe: bool
) -> list[dict[str, Any]]:
    """The tolerance's measure on held-out text at each budget, from one pass that writes nothing."""
    target = parse(str(context.recipe.tolerance)).held_out
    kind = "fits" if _fits(context) else "closed forms"

    def listen(event: Progress) -> None:
        context.on_progress(Progress("search", event.done, event.total, f"{kind} at {len(budgets)} budgets"))

    recipes = [context.recipe.at_budget(share) for share in budgets]
    traced = budget_curve.trace(replace(context, on_progress=listen), recipes)
    return [
        {"kv_budget": point["kv_budget"], "measured": target.value(point), "as_asked": full_recipe}
        for point in traced["points"]
    ]


def step_up(state: dict[str, Any], target: Tolerance) -> float:
    """Return the budget after a miss: interpolated anew, at least one step larger, at most one known to be within."""
    failed, misses = state["kv_budget"], len(state["tried"])
    known = points([*state["looked"], *state["tried"]], target, full_recipe=True)
    least = failed * (1 + STEP_UP * 2 ** (misses - 1))
    better = round_up(max(smallest_budget_within(known, SAFETY_FACTOR * target.allowed), least))
    met = [budget for budget, loss in known if budget > failed and loss <= target.allowed]
    return min(better, *met[:1]) if met else better


def _out_of_reach(target: Tolerance, measured: float) -> BudgetError:
    """The error for a tolerance that the largest budget misses."""
    return BudgetError(
        f"no budget meets the tolerance {target}: with the largest KV budget that the settings allow the conversion "
        f"still measures {measured:.4g}; choose a larger tolerance, or other settings (dtype, profile, limits)"
    )
