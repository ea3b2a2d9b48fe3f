"""Makes a recipe from the options of a conversion or a curve."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import typer

from ...convert.methods.registry import settings_class
from ...convert.recipe import tolerance
from ...convert.recipe.recipe import Calibration, Recipe
from ...convert.recipe.steps import Step
from .from_settings import Group, Values, by_parameter, parameter_of, said, values_of

SIZES = ("kv_budget", "kv_lora_rank", "qk_rope_head_dim")


def require_applicable(methods: Sequence[str], groups: Sequence[Group], options: Values) -> None:
    """Raise BadParameter for an option that none of `methods` has or that means something else for each of several,
    and for options that exclude each other."""
    concerned = [group for group in groups if any(map(group.concerns, methods))]
    entries, named = by_parameter(concerned), "+".join(methods)
    for group in groups:
        others = [field.name for field in group.fields if parameter_of(field) not in entries]
        for flag in said([dataclasses.replace(group, only=others)], options):
            raise typer.BadParameter(f"{flag} does not apply to {named}")
    for name, shared in entries.items():
        if len({field.option for _, field in shared}) > 1 and options.get(name) is not None:
            of = " and ".join(str(group.method) for group, _ in shared)
            raise typer.BadParameter(
                f"--{name.replace('_', '-')} is of {of}, for each something else; a recipe has the settings of each "
                f"step (methods: in mhconvert run), or convert in {len(methods)} commands"
            )
    sizes = [name for name in SIZES if options.get(name) is not None]
    for name, words in _instead_of_budget(methods).items():
        if "kv_budget" in sizes and options.get(name) is not None:
            raise typer.BadParameter(f"give --kv-budget, or {words}, but not both")
    if sizes and options.get("tolerance") is not None:
        raise typer.BadParameter("give --tolerance, or a budget or sizes, but not both")
    if options.get("prompts") is not None and not str(options.get("tolerance")).startswith("generation="):
        raise typer.BadParameter(
            "--prompts is of --tolerance generation=NATS: give that too, or leave it out"
        )


def _instead_of_budget(methods: Sequence[str]) -> dict[str, str]:
    return {name: words for each in methods for name, words in settings_class(each).instead_of_budget.items()}


def recipe_of(
    donor: str, methods: Sequence[str], groups: Sequence[Group], options: Values, **others: Any
) -> Recipe:
    """Return the recipe that the options describe; `others` are fields of it that are not options.

    Args:
        methods: one, or the steps of a chain; an option that several of them have goes to each.

    Raises:
        MhconvertError: Values are out of range or exclude each other.
    """
    fields: dict[str, Any] = {"calibration": {}}
    settings: dict[str, dict[str, Any]] = {name: {} for name in methods}
    for group in groups:
        if group.kind is Recipe:
            fields |= values_of(group, options)
        elif group.kind is Calibration:
            fields["calibration"] |= values_of(group, options)
        elif group.method in settings:
            settings[group.method] |= values_of(group, options)
    if "tolerance" in fields:
        fields["tolerance"] = str(tolerance.parse(fields["tolerance"]))  # in its one spelling
    steps = [Step(name, settings_class(name)(**settings[name])) for name in methods]
    first = {"method": steps[0].method, "settings": steps[0].settings}
    fields |= first if len(steps) == 1 else {"methods": steps}
    calibration = Calibration(**fields.pop("calibration"))
    return Recipe(donor, calibration=calibration, **fields, **others)
