"""Reads a user's plan of how many components of every layer have how many bits; imports no torch."""

from __future__ import annotations

from typing import Any

from mhconvert.errors import BudgetError

from ..plan_file import read_layers


def read_plan(plan: Any) -> list[Any]:
    """The layers of a plan: a file with {"layers": […]}, or the list itself. Raises BudgetError for anything else."""
    plan = read_layers(plan)
    key = "components_by_bits"
    if not isinstance(plan, (list, tuple)) or not all(isinstance(layer, dict) for layer in plan):
        raise BudgetError("the plan is no list of layers such as {components_by_bits: {8: 4, 2: 90}}")
    for index, layer in enumerate(plan):
        if not isinstance(layer.get(key), dict):
            raise BudgetError(
                f"plan, layer {index}: it needs {key}, such as {{8: 4, 2: 90}}; it is {layer!r}"
            )
    return [{key: {str(width): count for width, count in layer[key].items()}} for layer in plan]
