"""A recipe: every choice that decides what a conversion produces. Frozen; read from and written to YAML."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Annotated, Any, Literal

from mhconvert.errors import MhconvertError

from ..methods.registry import ADAPTERS, METHOD_NAMES, settings_class
from ..storage.byte_size import DEFAULT_SHARD_SIZE
from ..validation.from_values import Reading
from ..validation.option import Option, Takes, default
from ..validation.settings import Settings
from ..validation.yaml_file import NOWHERE, Origins
from .calibration_settings import Calibration as Calibration
from .choices_together import require_together
from .folder_name import require_folder_name
from .heal_settings import SEED, HealSettings
from .recorded import read_recipe, save_values
from .steps import Step, choose, converting, read_steps, require_chain, settled, unknown
from .tolerance import PROMPTS, checked
from .torch_device import known_device
from .written_weights import DTYPES, known_dtype, shard_size

Effort = Literal["quick", "default", "high"]
STAGES = ("eval", "export", "push")  # keys of a recipe's file that are no part of a conversion


def named(model: str) -> str:
    """Return the donor's name. Raises MhconvertError where it is empty."""
    if not model.strip():
        raise MhconvertError("model is empty; name a donor, such as smollm2-135m")
    return model


@dataclass(frozen=True)
class Recipe(Settings):
    """One conversion, or with `methods` a chain. `settings` belongs to the method (its folder's `settings.py`)."""

    model: Annotated[
        str,
        Option(
            "The donor: alias, org/name[@revision], folder, or .gguf file.",
            "DONOR",
            parse=named,
            also=str,
            flag="",
        ),
    ]
    method: Annotated[
        str, Option("The conversion's method.", "METHOD", flag="", default="required, or `methods`")
    ] = ""
    settings: Annotated[Any, Option("What the method lets one choose.", flag="")] = None
    tolerance: Annotated[
        str | None,
        Option(
            "Instead of a KV budget: the smallest one within it on held-out text, such as kl=0.05 (nats a token) or "
            "ppl=1.05 (times the donor's perplexity), or on text that the result writes, such as generation=0.2 "
            "(nats a token).",
            "kl=NATS|ppl=RATIO|generation=NATS",
            parse=checked,
            also=str,
        ),
    ] = None
    output: Annotated[
        Takes[str | None, str | PurePath | None],
        Option("Folder to write.", "OUT", flag="", default="./DONOR-METHOD"),
    ] = default(None)
    calibration: Annotated[
        Calibration, Option("Text that the statistics and the layer-local fit see.", flag="")
    ] = field(default_factory=Calibration)
    effort: Annotated[
        Effort,
        Option("quick: the closed form alone; default: and a fit of every layer; high: two longer ones."),
    ] = "default"
    fit_steps: Annotated[
        int | None,
        Option(
            "Optimiser steps a layer, whatever the effort; 0: the closed form alone.",
            "N",
            ge=0,
            range_hint="is negative; 0 means the closed form alone",
        ),
    ] = None
    seed: Annotated[int, SEED] = 0
    dtype: Annotated[
        str | None,
        Option(
            "Of the written weights: float32, bfloat16 or float16.",
            default="the donor's; of a GGUF float32",
            parse=known_dtype,
            also=str,
            words=DTYPES,
        ),
    ] = None
    device: Annotated[
        str | None,
        Option(
            "Torch device.",
            "DEVICE",
            parse=known_device,
            also=str,
            default="CUDA if present, else the CPU",
        ),
    ] = None
    max_shard_size: Annotated[
        Takes[str, str | float],
        Option("Size of one safetensors file, at most.", "SIZE", parse=shard_size, also=str | int | float),
    ] = default(DEFAULT_SHARD_SIZE)
    verify: Annotated[
        bool,
        Option(
            "Reload the result in a bare process, which holds the whole model.",
            flag="--no-verify",
            flag_help="Skip the reload in a bare process, which holds the whole model.",
        ),
    ] = True
    trust_remote_code: Annotated[bool, Option("Run Python code that comes inside the model folder.")] = False
    heal: Annotated[
        HealSettings | None, Option("Train the result to predict as the donor does.", flag="")
    ] = None
    methods: Annotated[
        Takes[tuple[Step, ...], Sequence[Step]],
        Option(
            "A chain, instead of method and settings: steps {method: …, settings: …}, of which each converts what the "
            "one before it made; hydra, last, puts its adapter into OUT-hydra.",
            flag="",
            default="none",
        ),
    ] = default(())
    prompts: Annotated[Takes[str | None, str | PurePath | None], PROMPTS] = default(None)

    def check(self) -> None:
        """Raise MhconvertError for a method that there is not, and for choices that do not go together.

        Of a chain, method and settings become those of the last step that rewrites layers.
        """
        if self.methods:
            self._take_chain()
        if self.method not in METHOD_NAMES:
            raise MhconvertError(unknown(self.method))
        if self.settings is None:
            self._set("settings", settings_class(self.method)())
        require_folder_name(self.output)
        require_together(self)

    def _take_chain(self) -> None:
        steps = settled(self.methods)
        require_chain(steps)
        self._set("methods", steps)
        own = converting(steps)
        if self.method not in ("", own[-1].method) or self.settings not in (None, own[-1].settings):
            raise MhconvertError("methods says what is done; leave out method and settings, or methods")
        self._set("method", own[-1].method)
        self._set("settings", own[-1].settings)

    def at_budget(self, share: float) -> Recipe:
        """Return the same conversion at another KV budget, without a tolerance."""
        settings = self.settings.at_budget(share)
        return dataclasses.replace(self, settings=settings, tolerance=None, prompts=None)

    @property
    def passes(self) -> tuple[Step, ...]:
        """The steps that rewrite layers, each in a pass of its own."""
        return converting(self.methods) or (Step(self.method, self.settings),)

    @property
    def adapter(self) -> Step | None:
        """The last step of a chain where that puts an adapter beside the result."""
        return self.methods[-1] if self.methods and self.methods[-1].method in ADAPTERS else None

    def part(self, count: int) -> Recipe:
        """Return the recipe of the first `count` passes; all of them: the whole without its adapter."""
        steps = self.passes[:count]
        own, heal = steps[-1], self.heal if count == len(self.passes) else None
        kept = steps if count > 1 else ()
        return dataclasses.replace(self, method=own.method, settings=own.settings, methods=kept, heal=heal)

    def with_last(self, settings: Any) -> Recipe:
        """Return the same conversion, or chain of passes, with other settings of the last."""
        steps = (*self.methods[:-1], Step(self.method, settings)) if self.methods else ()
        return dataclasses.replace(self, settings=settings, methods=steps)

    def output_folder(self, donor_name: str) -> Path:
        """Where the checkpoint goes: `output`, or `./<donor>-<method>`, with the methods of a chain in order."""
        names = "-".join(step.method for step in self.passes)
        return Path(self.output) if self.output else Path(f"{donor_name}-{names}")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON/YAML types, of a chain its methods alone; `from_dict` of it equals this recipe."""
        plain = dataclasses.asdict(self)
        plain["calibration"]["sources"] = list(self.calibration.sources)
        if self.prompts is None:  # which recipes of earlier versions do not have
            del plain["prompts"]
        methods = list(plain.pop("methods"))
        if not methods:
            return plain
        whole = {name: value for name, value in plain.items() if name not in ("method", "settings")}
        return {"model": whole.pop("model"), "methods": methods, **whole}

    @staticmethod
    def from_dict(data: dict[str, Any], origins: Origins = NOWHERE) -> Recipe:
        """Return the recipe that plain values describe; keys of later stages (STAGES) are left aside.

        Args:
            data: Plain values, as YAML or JSON give them.
            origins: Where the values stand, for messages.
        Raises:
            RecipeError: Unknown or missing keys, and wrong types.
            MhconvertError: Values out of range; a RecipeError with the line where they come from a file.
        """
        reading = Reading(origins, STAGES)
        recipe: Recipe = Recipe.read(data, reading)
        reading.raise_faults()
        return recipe

    @staticmethod
    def read(data: dict[str, Any], reading: Reading) -> Any:
        """Return what `from_dict` returns, or None with faults in `reading`; without a method nothing else is read."""
        values = {name: value for name, value in data.items() if name not in STAGES}
        if values.get("methods") is None:
            values.pop("methods", None)
        else:
            before, steps = len(reading.faults), read_steps(values, reading)
            return reading.read(Recipe, steps) if len(reading.faults) == before else None
        if values.get("method") not in tuple(METHOD_NAMES):
            what = unknown(values["method"]) if "method" in values else f"the method is missing; {choose()}"
            reading.faults.append(reading.origins.fault(("method",), what))
            return None
        reading.kinds["settings"] = settings_class(values["method"])
        return reading.read(Recipe, values)


def load_recipe(path: Path) -> Recipe:
    """Return the conversion in a YAML file. Raises RecipeError with the line of the fault."""
    document = read_recipe(path)
    return Recipe.from_dict(document.values, document.origins)


def save_recipe(recipe: Recipe, path: Path) -> None:
    """Write `recipe` as YAML that `load_recipe` reads back to an equal recipe."""
    save_values(recipe.to_dict(), path)
