"""Reads a user's plan of how many components of every layer have how many bits; imports no torch."""

from __future__ import annotations

from typing import Any

from mhconvert.errors import BudgetError

from ..plan_file import name_of, read_layers

KEY = "components_by_bits"
EXAMPLE = "{8: 4, 2: 90}"


def read_plan(plan: Any) -> list[dict[str, Any]]:
    """The layers of a plan: a file with {"layers": […]}, or the list itself. Raises BudgetError for anything else."""
    layers = read_layers(plan, f"{{{KEY}: {EXAMPLE}}}")
    return [layer_bits(plan, index, layer) for index, layer in enumerate(layers)]


def layer_bits(plan: Any, index: int, layer: dict[str, Any]) -> dict[str, Any]:
    """{"components_by_bits": …} of the layer `index` of a plan. Raises BudgetError, naming both, where it has none."""
    if not isinstance(layer.get(KEY), dict):
        raise BudgetError(
            f"{name_of(plan)}, layer {index}: it needs {KEY}, such as {EXAMPLE}; it is {layer!r}"
        )
    return {KEY: {str(width): count for width, count in layer[KEY].items()}}
