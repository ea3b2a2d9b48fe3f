"""Makes a recipe from the options of a conversion or a curve."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import typer

from ...convert.methods.registry import settings_class
from ...convert.recipe import tolerance
from ...convert.recipe.recipe import Calibration, Recipe
from .from_settings import Group, Values, parameter_of, said, values_of

SIZES = ("kv_budget", "kv_lora_rank", "qk_rope_head_dim")


def require_applicable(method: str, groups: Sequence[Group], options: Values) -> None:
    """Raise BadParameter for an option that `method` does not have, and for options that exclude each other."""
    own = {parameter_of(field) for group in groups if group.concerns(method) for field in group.fields}
    for group in groups:
        others = [field.name for field in group.fields if parameter_of(field) not in own]
        for flag in said([dataclasses.replace(group, only=others)], options):
            raise typer.BadParameter(f"{flag} does not apply to {method}")
    sizes = [name for name in SIZES if options.get(name) is not None]
    for name, words in settings_class(method).instead_of_budget.items():
        if "kv_budget" in sizes and options.get(name) is not None:
            raise typer.BadParameter(f"give --kv-budget, or {words}, but not both")
    if sizes and options.get("tolerance") is not None:
        raise typer.BadParameter("give --tolerance, or a budget or sizes, but not both")


def recipe_of(donor: str, method: str, groups: Sequence[Group], options: Values, **others: Any) -> Recipe:
    """Return the recipe that the options describe; `others` are fields of it that are not options.

    Raises:
        MhconvertError: Values are out of range or exclude each other.
    """
    fields: dict[str, Any] = {"settings": {}, "calibration": {}}
    for group in groups:
        if group.kind is Recipe:
            fields |= values_of(group, options)
        elif group.kind is Calibration:
            fields["calibration"] |= values_of(group, options)
        elif group.method == method:
            fields["settings"] |= values_of(group, options)
    settings, calibration = fields.pop("settings"), fields.pop("calibration")
    if "tolerance" in fields:
        fields["tolerance"] = str(tolerance.parse(fields["tolerance"]))  # in its one spelling
    return Recipe(
        donor,
        method,
        settings=settings_class(method)(**settings),
        calibration=Calibration(**calibration),
        **fields,
        **others,
    )
