"""Rewrite the attention of pretrained language models.

`mhconvert.convert(recipe)`, `mhconvert.plan(recipe)`, `mhconvert.curve(recipe, budgets)`, `mhconvert.heal(...)`,
`mhconvert.evaluate(...)`, `mhconvert.merge(...)`, `mhconvert.export(...)`, `mhconvert.verify(...)`,
`mhconvert.inspect(...)`,
`mhconvert.generate(...)`, `mhconvert.bench(...)`, `mhconvert.push(...)` and `mhconvert.run(recipe)` are what the
command line calls. Nothing heavy is imported until one of them is used; importing `HydraConfig` makes peft know that
method.
"""

from __future__ import annotations

import importlib
from typing import Any

from mhconvert.version import __version__

_PUBLIC = {
    "convert": ("mhconvert.convert", None),
    "plan": ("mhconvert.api", "plan"),
    "curve": ("mhconvert.api", "curve"),
    "heal": ("mhconvert.heal", None),
    "merge": ("mhconvert.api", "merge"),
    "export": ("mhconvert.api", "export"),
    "verify": ("mhconvert.api", "verify"),
    "evaluate": ("mhconvert.api", "evaluate"),
    "inspect": ("mhconvert.api", "inspect"),
    "generate": ("mhconvert.api", "generate"),
    "bench": ("mhconvert.api", "bench"),
    "push": ("mhconvert.api", "push"),
    "run": ("mhconvert.run", None),
    "EvalSettings": ("mhconvert.eval.settings", "EvalSettings"),
    "Recipe": ("mhconvert.convert.recipe.recipe", "Recipe"),
    "HealSettings": ("mhconvert.convert.recipe.heal_settings", "HealSettings"),
    "Calibration": ("mhconvert.convert.recipe.recipe", "Calibration"),
    "HydraConfig": ("mhconvert.convert.methods.hydra", "HydraConfig"),
    "load_recipe": ("mhconvert.convert.recipe.recipe", "load_recipe"),
    "MhconvertError": ("mhconvert.errors", "MhconvertError"),
}

__all__ = [*_PUBLIC, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'mhconvert' has no attribute '{name}'")
    module_name, attribute = _PUBLIC[name]
    module = importlib.import_module(module_name)
    return getattr(module, attribute) if attribute else module


def __dir__() -> list[str]:
    return sorted(__all__)
