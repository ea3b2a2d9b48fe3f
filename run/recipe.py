"""The whole run in one file: a conversion and the stages behind it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from mhconvert.convert.recipe import Recipe
from mhconvert.run.settings import EvalStage, ExportStage, PushStage

STAGES = {"eval": EvalStage, "export": ExportStage, "push": PushStage}


@dataclass(frozen=True)
class RunRecipe:
    """A conversion, healed where it says so, and what is done with the result. None: without that stage."""

    convert: Recipe
    eval: EvalStage | None = None
    export: ExportStage | None = None
    push: PushStage | None = None

    @property
    def stages(self) -> tuple[str, ...]:
        """The stages that there are, in their order: convert, heal, eval, export, push."""
        healed = ("heal",) if self.convert.heal is not None else ()
        return ("convert", *healed, *(name for name in STAGES if getattr(self, name) is not None))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON/YAML types, without the stages that there are not; `from_dict` of it equals this recipe."""
        plain = self.convert.to_dict()
        for name in STAGES:
            stage = getattr(self, name)
            if stage is not None:
                values = dataclasses.asdict(stage)
                plain[name] = {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}
        return plain
