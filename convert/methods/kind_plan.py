"""Reads a user's plan of what every layer becomes, with windows, bits or linear layers; imports no torch."""

from __future__ import annotations

from typing import Any

from mhconvert.errors import BudgetError

from .layer_kinds import LINEAR
from .layer_options import LEAST_WINDOW
from .mla.plan_file import layer_bits, read_plan
from .plan_file import name_of, read_layers

WINDOW = "window"


def read_windows(plan: Any) -> list[dict[str, Any]]:
    """[{"window": tokens, or None for a full layer}] of every layer. Raises BudgetError for anything else."""
    layers = read_layers(plan, f"{{{WINDOW}: 1024}} or {{{WINDOW}: null}}")
    for index, layer in enumerate(layers):
        width = layer.get(WINDOW, "")
        if width is not None and (type(width) is not int or width < LEAST_WINDOW):
            raise BudgetError(
                f"{name_of(plan)}, layer {index}: it needs {WINDOW}, a number of tokens from {LEAST_WINDOW}, or null "
                f"for a full layer; it is {layer!r}"
            )
    return [{WINDOW: layer[WINDOW]} for layer in layers]


def read_coded_windows(plan: Any) -> list[dict[str, Any]]:
    """As `read_windows`, and of every layer its components_by_bits."""
    return [bits | window for bits, window in zip(read_plan(plan), read_windows(plan), strict=True)]


def read_linear(plan: Any) -> list[dict[str, Any]]:
    """[{"kind": "linear"}, or components_by_bits] of every layer. Raises BudgetError for anything else."""
    layers = read_layers(plan, f"{{kind: {LINEAR}}} or {{components_by_bits: {{8: 4, 2: 90}}}}")
    return [
        {"kind": LINEAR} if layer.get("kind") == LINEAR else layer_bits(plan, index, layer)
        for index, layer in enumerate(layers)
    ]
