"""A recipe: every choice that decides what a conversion produces. Frozen; read from and written to YAML."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Annotated, Any, Literal

import yaml

from mhconvert.errors import MhconvertError

from ..methods.registry import ADAPTERS, CACHE_METHODS, METHOD_NAMES, settings_class
from ..storage.byte_size import DEFAULT_SHARD_SIZE
from ..validation.field_types import changed_fields
from ..validation.from_values import Reading
from ..validation.option import Option, Takes, default
from ..validation.settings import Settings
from ..validation.yaml_file import NOWHERE, Origins
from .calibration_settings import Calibration as Calibration
from .folder_name import require_folder_name
from .heal_settings import SEED, HealSettings
from .recorded import read_recipe
from .tolerance import checked
from .torch_device import known_device
from .written_weights import DTYPES, known_dtype, shard_size

Effort = Literal["quick", "default", "high"]
STAGES = ("eval", "export", "push")  # keys of a recipe's file that are no part of a conversion
OF_THE_PASS = (
    "tolerance",
    "calibration",
    "effort",
    "fit_steps",
    "dtype",
    "device",
    "max_shard_size",
    "verify",
    "heal",
)  # no adapter has a use for these


def named(model: str) -> str:
    """Return the donor's name. Raises MhconvertError where it is empty."""
    if not model.strip():
        raise MhconvertError("model is empty; name a donor, such as smollm2-135m")
    return model


@dataclass(frozen=True)
class Recipe(Settings):
    """One conversion. `settings` belongs to the method (its folder's `settings.py`)."""

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
    method: Annotated[str, Option("The conversion's method.", "METHOD", flag="")]
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

    def check(self) -> None:
        """Raise MhconvertError for a method that there is not, and for choices that do not go together."""
        if self.method not in METHOD_NAMES:
            raise MhconvertError(f"unknown method '{self.method}'; choose one of {', '.join(METHOD_NAMES)}")
        if self.settings is None:
            self._set("settings", settings_class(self.method)())
        require_folder_name(self.output)
        if self.method in ADAPTERS:
            self._require_no_pass()
        self._require_one_fusion()
        if self.tolerance is not None:
            if self.method not in CACHE_METHODS:
                raise MhconvertError(
                    f"a tolerance decides a KV budget, which {self.method} does not have; leave it out"
                )
            free = self.settings.at_budget(type(self.settings)().kv_budget)  # refuses explicit sizes
            if free != self.settings:
                raise MhconvertError(
                    f"a tolerance decides the KV budget; leave out kv_budget={self.settings.kv_budget} or the "
                    "tolerance"
                )

    def _require_one_fusion(self) -> None:
        """Raise MhconvertError where only one of conversion and healing leaves the fusion of heads to training."""
        trained = getattr(self.settings, "fusion", None) == "trained"
        if self.heal is not None and trained != (self.heal.fusion is not None):
            raise MhconvertError(
                "with fusion: trained heads become one while healing, which must say how many: give heal.fusion: 2 "
                "beside it in a recipe, or convert first and then mhconvert heal CKPT --fusion 2"
                if trained
                else "heal.fusion is of heads still to be fused: give settings.fusion: trained, or leave it out"
            )

    def _require_no_pass(self) -> None:
        for name in changed_fields(self):
            if name in OF_THE_PASS:
                raise MhconvertError(
                    f"{name} does not apply to {self.method}, which adds an adapter and rewrites no layer; leave it out"
                )

    def at_budget(self, share: float) -> Recipe:
        """Return the same conversion at another KV budget, without a tolerance."""
        return dataclasses.replace(self, settings=self.settings.at_budget(share), tolerance=None)

    def output_folder(self, donor_name: str) -> Path:
        """Where the checkpoint goes: `output`, or `./<donor>-<method>`."""
        return Path(self.output) if self.output else Path(f"{donor_name}-{self.method}")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON/YAML types; `from_dict` of it equals this recipe."""
        plain = dataclasses.asdict(self)
        plain["calibration"]["sources"] = list(self.calibration.sources)
        return plain

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
        if values.get("method") not in tuple(METHOD_NAMES):
            found = f"unknown method '{values['method']}'" if "method" in values else "the method is missing"
            what = f"{found}; choose one of {', '.join(METHOD_NAMES)}"
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
    path.write_text(yaml.safe_dump(recipe.to_dict(), sort_keys=False), encoding="utf-8")
