"""The chain of steps that made a folder, from its first donor on, and what may follow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mhconvert.errors import UnsupportedError

from ..methods import combinations
from ..methods.registry import METHODS
from ..recipe.recipe import Recipe
from ..recipe.recorded import last_step
from ..storage.safetensors_reader import read_json
from . import identity
from .provenance import read_record


def steps(folder: Path) -> list[dict[str, Any]]:
    """The steps that made `folder`, first to last: model (what it began with), method and settings of each.

    The model is None for the later steps of one command, as what they began with is gone. [] for a folder that no step
    made, or whose record says nothing of them.
    """
    record = read_record(folder)
    recipe, merged, earlier = record.get("recipe"), record.get("merged"), record.get("chain")
    own: list[dict[str, Any]] = []
    if isinstance(merged, dict):
        own = [{"model": merged.get("base"), "method": merged.get("method"), "settings": {}}]
    elif isinstance(recipe, dict):
        last, model = last_step(recipe), None if recipe.get("methods") else recipe.get("model")
        own = [{"model": model, "method": last.get("method"), "settings": last.get("settings") or {}}]
    return [*(earlier if isinstance(earlier, list) else []), *own]


def first_model(folder: Path) -> str | None:
    """The reference of the model that the chain of `folder` began with; None for a folder without a chain."""
    return _first(steps(folder))


def measured_model(folder: Path) -> str | None:
    """The reference of the model that `folder` is measured against: what its steps behind the last merged adapter began
    with, since what was trained is not to be undone; None where there are none."""
    return _first(combinations.behind_adapters(steps(folder)))


def _first(some: list[dict[str, Any]]) -> str | None:
    return next((str(step["model"]) for step in some if step.get("model")), None)


def methods(folder: Path) -> list[str]:
    """The methods that rewrote layers of what is in `folder`, first to last, by its record or else by its class."""
    recorded = [str(step["method"]) for step in steps(folder) if step.get("method") in METHODS]
    own = identity.converted_method(str(folder))
    return recorded or ([own] if own else [])


def refusal(folder: Path, recipe: Recipe) -> str | None:
    """Why `recipe` cannot convert what earlier steps made in `folder`, by the table; None: it can."""
    model_type = str(read_json(folder / "config.json").get("model_type", ""))
    kinds = [combinations.held_kind(name, model_type) for name in methods(folder)]
    return combinations.refusal(kinds, combinations.kind(recipe.method, recipe.settings))


def require_donor(folder: Path, recipe: Recipe) -> None:
    """Raise UnsupportedError where `recipe` cannot convert its model in `folder`, as earlier steps made it.

    The message says which folder or order to take instead.
    """
    reference = recipe.model
    if identity.exported(str(folder)):
        exported = read_record(folder).get("exported") or {}
        source = (
            exported.get("source") or exported.get("checkpoint") or "the checkpoint that it was made from"
        )
        raise UnsupportedError(f"{reference} is an export, which ends a chain; convert {source} instead")
    made = methods(folder)
    if not made:
        return
    reason = refusal(folder, recipe)
    if reason is not None:
        first = first_model(folder)
        begun = f" (the first began with {first})" if first and "the first began with" in reason else ""
        raise UnsupportedError(f"{reference} was made by {' and then '.join(made)}, and {reason}{begun}")
