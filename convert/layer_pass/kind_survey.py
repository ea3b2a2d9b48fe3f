"""What every layer would cost as one of a kind that the recipe's method does not have: windowed, or linear.

Each is surveyed as the last method of that kind surveys it, with the recipe's own context, window and text.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mhconvert.errors import BudgetError, MhconvertError

from ..methods.registry import METHODS, Method, build_method, info, settings_class
from ..recipe.recipe import Recipe
from ..validation.option import declared
from . import cost_estimate, survey
from .context import ConversionContext

CHOSEN = "the plan, or the list of layers, says which ones they are"
SHARED = ("context", "window")  # choices that methods of both kinds have, and that mean the same


def surveyed_plan(context: ConversionContext, method: Method) -> dict[str, Any]:
    """`cost_estimate.plan` behind a survey of the layers.

    Where they are of several kinds, each of `layers` has the `costs` of all kinds, nats a token, and `priced` says for
    each kind what it was measured as, {"method", …}, or {"reason": why it was not}.
    """
    method.share_out(survey.measure_needs(context))
    plan = cost_estimate.plan(context.recipe, context.donor, method, context.device)
    own, layers = info(context.recipe.method).layer_kind, plan["layers"]
    if not own:
        return plan
    priced = plan.get("priced", {own: {"reason": CHOSEN}})
    for kind, name in {each.layer_kind: each.name for each in METHODS.values() if each.layer_kind}.items():
        if kind == own:
            continue
        try:
            recipe = _recipe(context, name)
            other = build_method(name, context.donor.config, recipe.settings, recipe.effort)
            _require_telling_rows(context, other)
        except MhconvertError as error:
            priced[kind] = {"reason": str(error)}
            continue
        needs = survey.layer_needs(context.with_recipe(recipe), other)
        layers = [
            layer | {"costs": layer.get("costs", {}) | {kind: need.divergence}}
            for layer, need in zip(layers, needs, strict=True)
        ]
        priced[kind] = {"method": name} | other.kind_facts
    return plan | {"layers": layers, "priced": priced}


def _recipe(context: ConversionContext, name: str) -> Recipe:
    """That of the method `name` at the whole budget. Raises MhconvertError where the donor cannot have it."""
    settings, kind = context.recipe.settings, settings_class(name)
    shared = {field: getattr(settings, field, None) for field in SHARED if field in declared(kind)}
    return replace(context.recipe, method=name, settings=kind(**shared).at_budget(1.0))


def _require_telling_rows(context: ConversionContext, other: Method) -> None:
    """Raise BudgetError where the calibration rows are too short for what `other` changes to show."""
    length = context.rows.fit.shape[1]
    if length < other.least_row:
        raise BudgetError(
            f"rows of {length} tokens show nothing of a window of {other.least_row - 1}; choose a longer "
            "--sequence-length"
        )
