"""Rewrite the attention of pretrained language models.

One function for each command: `convert_model`, `plan`, `curve`, `heal_model`, `evaluate`, `merge`, `export`, `verify`,
`inspect`, `generate`, `bench`, `push` and `run_recipe`; `mhconvert.convert(…)`, `mhconvert.heal(…)` and
`mhconvert.run(…)` are the same functions under the names of their packages. Nothing heavy is imported until one of
them is used; importing `HydraConfig` makes peft know that method.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from mhconvert.version import __version__

if TYPE_CHECKING:
    from mhconvert.api import bench as bench
    from mhconvert.api import convert as convert
    from mhconvert.api import curve as curve
    from mhconvert.api import evaluate as evaluate
    from mhconvert.api import export as export
    from mhconvert.api import generate as generate
    from mhconvert.api import heal as heal
    from mhconvert.api import inspect as inspect
    from mhconvert.api import merge as merge
    from mhconvert.api import plan as plan
    from mhconvert.api import push as push
    from mhconvert.api import verify as verify
    from mhconvert.convert.methods.dha.settings import DHASettings as DHASettings
    from mhconvert.convert.methods.hybrid_mla.settings import HybridSettings as HybridSettings
    from mhconvert.convert.methods.hydra import HydraConfig as HydraConfig
    from mhconvert.convert.methods.hydra.settings import HydraSettings as HydraSettings
    from mhconvert.convert.methods.mla.settings import MLASettings as MLASettings
    from mhconvert.convert.methods.mla_swa.settings import MLASWASettings as MLASWASettings
    from mhconvert.convert.methods.moh.settings import MoHSettings as MoHSettings
    from mhconvert.convert.methods.swa.settings import SWASettings as SWASettings
    from mhconvert.convert.recipe.heal_settings import HealSettings as HealSettings
    from mhconvert.convert.recipe.recipe import Calibration as Calibration
    from mhconvert.convert.recipe.recipe import Recipe as Recipe
    from mhconvert.convert.recipe.recipe import load_recipe as load_recipe
    from mhconvert.convert.recipe.steps import Step as Step
    from mhconvert.errors import MhconvertError as MhconvertError
    from mhconvert.eval.settings import EvalSettings as EvalSettings
    from mhconvert.run.run_recipe import run as run

    convert_model, heal_model, run_recipe = convert, heal, run

_PACKAGES = (
    "convert",
    "heal",
    "run",
)  # packages that are called like a function: the package can be called too
_PUBLIC = {
    "mhconvert.api": (
        *("plan", "curve", "merge", "export", "verify", "evaluate", "inspect", "generate", "bench", "push"),
    ),
    "mhconvert.eval.settings": ("EvalSettings",),
    "mhconvert.convert.recipe.recipe": ("Recipe", "Calibration", "load_recipe"),
    "mhconvert.convert.recipe.steps": ("Step",),
    "mhconvert.convert.recipe.heal_settings": ("HealSettings",),
    "mhconvert.convert.methods.mla.settings": ("MLASettings",),
    "mhconvert.convert.methods.dha.settings": ("DHASettings",),
    "mhconvert.convert.methods.mla_swa.settings": ("MLASWASettings",),
    "mhconvert.convert.methods.moh.settings": ("MoHSettings",),
    "mhconvert.convert.methods.swa.settings": ("SWASettings",),
    "mhconvert.convert.methods.hybrid_mla.settings": ("HybridSettings",),
    "mhconvert.convert.methods.hydra.settings": ("HydraSettings",),
    "mhconvert.convert.methods.hydra": ("HydraConfig",),
    "mhconvert.errors": ("MhconvertError",),
}
_MODULES = {name: (module, name) for module, names in _PUBLIC.items() for name in names} | {
    "convert_model": ("mhconvert.api", "convert"),
    "heal_model": ("mhconvert.api", "heal"),
    "run_recipe": ("mhconvert.run.run_recipe", "run"),
}

__all__ = [*_PACKAGES, *_MODULES, "__version__"]


def __getattr__(name: str) -> Any:
    if name in _PACKAGES:
        return importlib.import_module(f"mhconvert.{name}")
    if name not in _MODULES:
        raise AttributeError(f"module 'mhconvert' has no attribute '{name}'")
    module, attribute = _MODULES[name]
    return getattr(importlib.import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted(__all__)
