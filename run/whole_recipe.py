"""A recipe's file: a conversion and the stages that follow it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..convert.methods.registry import METHOD_NAMES
from ..convert.recipe.recipe import STAGES, Recipe
from ..convert.recipe.recorded import read_recipe
from ..convert.recipe.steps import Step
from ..convert.validation.field_types import changed_fields
from ..convert.validation.from_values import Reading
from ..convert.validation.settings import json_types
from ..convert.validation.yaml_file import NOWHERE, Origins
from ..eval.settings import EvalSettings
from . import overrides as given
from .stage_settings import ExportStage, PushStage, export_fault

KINDS = {"eval": EvalSettings, "export": ExportStage, "push": PushStage}


@dataclass(frozen=True)
class RunRecipe:
    """A conversion, with healing if it says so, and the stages that follow; None leaves a stage out."""

    convert: Recipe
    eval: EvalSettings | None = None
    export: ExportStage | None = None
    push: PushStage | None = None

    @property
    def stages(self) -> tuple[str, ...]:
        """The names of the stages, in order: convert, heal, adapter, eval, export, push."""
        healed = ("heal",) if self.convert.heal is not None else ()
        adapted = ("adapter",) if self.convert.adapter is not None else ()
        return ("convert", *healed, *adapted, *(name for name in STAGES if getattr(self, name) is not None))

    def summary(self) -> str:
        """What the run does, in words: "convert llama3-8b with mla (kv_budget=0.25), evaluate quick"."""
        words = [f"convert {self.convert.model} with {', then '.join(map(_chosen, self.convert.passes))}"]
        if self.convert.heal is not None:
            words.append(f"heal on {self.convert.heal.tokens + self.convert.heal.layer_tokens:,} tokens")
        if self.convert.adapter is not None:
            words.append(f"put beside it {_chosen(self.convert.adapter)}")
        if self.eval is not None:
            suite = [self.eval.suite] if self.eval.suite else []
            probes = ("retrieval", "generation", "refusals")
            others = [name for name in probes if getattr(self.eval, name)]
            words.append(f"evaluate {', '.join([*suite, *self.eval.tasks, *self.eval.text, *others])}")
        if self.export is not None:
            words.append(f"export to {self.export.to}")
        if self.push is not None:
            words.append(f"push to {self.push.repo}")
        return ", ".join(words)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON/YAML types, without the stages that there are not; `from_dict` of it equals this recipe."""
        plain = self.convert.to_dict()
        for name in STAGES:
            stage = getattr(self, name)
            if stage is not None:
                plain[name] = json_types(stage)
        return plain

    @staticmethod
    def from_dict(data: dict[str, Any], origins: Origins = NOWHERE) -> RunRecipe:
        """Return the recipe that plain values describe.

        Args:
            data: The keys of a conversion, and a mapping for each stage that follows.
            origins: Where the values stand, for messages.
        Raises:
            RecipeError: As `Recipe.from_dict`, with the faults of all stages.
        """
        reading = Reading(origins, STAGES)
        convert = Recipe.read(data, reading)
        named = [name for name in STAGES if data.get(name) is not None]
        stages = {name: reading.inner(KINDS[name], data[name], (name,)) for name in named}
        export, method = stages.get("export"), convert.method if convert else data.get("method")
        if export is not None and method in tuple(METHOD_NAMES):
            fault = export_fault(method, export)
            if fault is not None:
                key, why = fault
                reading.faults.append(origins.fault(("export", key), f"export.{why}"))
        reading.raise_faults()
        return RunRecipe(convert, **stages)


def _chosen(step: Step) -> str:
    """A step in words: "mla (kv_budget=0.25)"."""
    chosen = ", ".join(f"{name}={getattr(step.settings, name)}" for name in changed_fields(step.settings))
    return step.method + (f" ({chosen})" if chosen else "")


def load(path: Path, overrides: Sequence[str] = ()) -> RunRecipe:
    """Return the recipe in a YAML file, with overrides `key.sub=value` (YAML) applied. Needs no model.

    Raises:
        RecipeError: With file, line and key, or the override, for each fault.
    """
    document = given.apply(read_recipe(path), overrides)
    return RunRecipe.from_dict(document.values, document.origins)
