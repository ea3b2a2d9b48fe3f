"""Heads that a conversion keeps whole: what a user says, by layer. Imports no torch."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mhconvert.errors import BudgetError

from ..validation.option import Option
from .plan_file import read_layers

WORDS = ("retrieval", "safety")
EXAMPLE = "{heads: [0, 3]}"
WEIGHT = 4.0  # of an error that a protected head reads, where errors are weighed
PROTECT = Option(
    "Heads that stay whole: those that retrieve, or that refuse, as `inspect --heads` measures them on the donor; or a "
    f"JSON file with layers such as {EXAMPLE}. dha: their KV heads are never fused. moh: every token has them. mla: "
    f"errors that they read count {WEIGHT:g} times.",
    "FILE|retrieval|safety",
)


def read_protected(value: Any) -> Any:
    """One of WORDS, which is still to be measured; else {"from": …, "layers": [{"heads": […]}, …]}; None for None.

    Raises BudgetError for what is neither, naming the file.
    """
    if value is None or value in WORDS:
        return value
    source, layers = "given", value
    if isinstance(value, dict):
        source, layers = value.get("from", source), value.get("layers")
    elif isinstance(value, (str, Path)):
        layers = Path(os.path.expanduser(value))  # without an error where there is no such user
        source = layers.name  # not where it lies: the same heads make the same recipe
        if not layers.exists():
            raise BudgetError(f"protect {value} is neither {' nor '.join(WORDS)}, and there is no such file")
    read = read_layers(layers, EXAMPLE, "protect")
    for index, layer in enumerate(read):
        heads = layer.get("heads")
        if not isinstance(heads, list) or not all(
            isinstance(h, int) and not isinstance(h, bool) for h in heads
        ):
            raise BudgetError(
                f"protect, layer {index}: it needs a list of heads such as {EXAMPLE}; it is {layer!r}"
            )
    return {"from": source, "layers": [{"heads": sorted(set(layer["heads"]))} for layer in read]}


def protected_heads(protect: Any, layers: int, heads: int) -> list[list[int]]:
    """The protected query heads of each layer; of heads that are still to be measured none.

    Raises BudgetError where the donor has not so many layers, or no such head.
    """
    if not isinstance(protect, dict):
        return [[] for _ in range(layers)]
    named = [layer["heads"] for layer in protect["layers"]]
    if len(named) != layers:
        raise BudgetError(f"protect has {len(named)} layers and the donor {layers}")
    for index, of_layer in enumerate(named):
        beyond = [head for head in of_layer if not 0 <= head < heads]
        if beyond:
            raise BudgetError(f"protect, layer {index}: there is no head {beyond[0]} of the donor's {heads}")
    return named


def head_weights(named: Sequence[int], heads: int) -> Any:
    """(H,): WEIGHT for the named heads, 1 for others; float64."""
    import torch

    weights = torch.ones(heads, dtype=torch.float64)
    weights[list(named)] = WEIGHT
    return weights


def groups_of(named: Sequence[Sequence[int]], heads: int, kv_heads: int) -> list[list[int]]:
    """The KV heads of each layer that its protected query heads read, ascending."""
    return [sorted({head * kv_heads // heads for head in of_layer}) for of_layer in named]
