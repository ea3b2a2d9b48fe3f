"""A recipe: all that decides what a conversion produces. Frozen; to YAML and back; unknown keys refused."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml

from mhconvert.errors import MhconvertError

from ..methods.registry import ADAPTERS, CACHE_METHODS, METHOD_NAMES, settings_class
from ..validation import yaml_file
from ..validation.field_types import Also, changed_fields
from ..validation.from_values import build
from ..validation.yaml_file import NOWHERE, Origins
from .heal_settings import HealSettings
from .tolerance import parse

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


@dataclass(frozen=True)
class Calibration:
    """Text that the statistics and the layer-local fit see.

    sources: files (.txt, .jsonl with a `text` field; globs are expanded), dataset names, or "self" (sampled
    from the donor). tokens: how many in all (None: by source, device and effort).
    sequence_length: tokens a row (None: 512, or what the donor reads).
    held_out: rows of the same text kept out of statistics and fit, on which fidelity is measured.
    """

    sources: Annotated[tuple[str, ...], Also(str)] = ("self",)
    tokens: int | None = None
    sequence_length: int | None = None
    held_out: int = 4

    def __post_init__(self) -> None:
        sources = (self.sources,) if isinstance(self.sources, str) else tuple(self.sources)
        object.__setattr__(self, "sources", sources)


@dataclass(frozen=True)
class Recipe:
    """One conversion. `settings` belongs to the method (its folder's `settings.py`).

    dtype: of the written weights (None: the donor's). device: torch device (None: CUDA if present).
    max_shard_size: bytes, or text such as "5GB". fit_steps: None: by effort; 0: closed form only.
    tolerance: "kl=0.05" (nats a token) or "ppl=1.05" (times the donor's perplexity) on the held-out rows: the
    smallest KV budget that meets it is searched, instead of a budget in the settings. heal: train the result to predict
    as the donor does.
    """

    model: str
    method: str
    settings: Any = None
    tolerance: str | None = None
    output: str | None = None
    calibration: Calibration = field(default_factory=Calibration)
    effort: Effort = "default"
    fit_steps: int | None = None
    seed: int = 0
    dtype: str | None = None
    device: str | None = None
    max_shard_size: Annotated[str, Also(int)] = "5GB"
    verify: bool = True
    trust_remote_code: bool = False
    heal: HealSettings | None = None

    def __post_init__(self) -> None:
        if self.method not in METHOD_NAMES:
            raise MhconvertError(f"unknown method '{self.method}'; choose one of {', '.join(METHOD_NAMES)}")
        object.__setattr__(self, "max_shard_size", str(self.max_shard_size))
        if self.settings is None:
            object.__setattr__(self, "settings", settings_class(self.method)())
        if self.method in ADAPTERS:
            self._require_no_pass()
        if self.tolerance is not None:
            parse(self.tolerance)
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
        if self.effort not in ("quick", "default", "high"):
            raise MhconvertError(f"effort '{self.effort}' is not one of quick, default, high")
        if self.fit_steps is not None and self.fit_steps < 0:
            raise MhconvertError(f"fit_steps={self.fit_steps} is negative; 0 means the closed form alone")
        if not 0 <= self.seed < 2**32:
            raise MhconvertError(f"seed={self.seed} is not between 0 and {2**32 - 1}")

    def _require_no_pass(self) -> None:
        for name in changed_fields(self):
            if name in OF_THE_PASS:
                raise MhconvertError(
                    f"{name} does not apply to {self.method}, which adds an adapter and rewrites no layer; leave it out"
                )

    def at_budget(self, share: float) -> Recipe:
        """The same conversion at a KV budget of its own, without a tolerance."""
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
        """The recipe that plain values say; what they say of STAGES is left to who runs those.

        origins: where the values stand, for messages. Raises RecipeError on a key that no part of a recipe has, one
        that is missing, or a wrong type, and what the parts raise on a value out of range.
        """
        values = {name: value for name, value in data.items() if name not in STAGES}
        if values.get("method") not in METHOD_NAMES:
            found = f"unknown method '{values['method']}'" if "method" in values else "the method is missing"
            raise origins.fault(("method",), f"{found}; choose one of {', '.join(METHOD_NAMES)}")
        hints = {"settings": settings_class(values["method"])}
        recipe: Recipe = build(Recipe, values, origins, hints=hints, beside=STAGES)
        return recipe


def load_recipe(path: Path) -> Recipe:
    """The conversion in a YAML file. Raises RecipeError, with the line, when there is none."""
    document = yaml_file.read(path)
    return Recipe.from_dict(document.values, document.origins)


def save_recipe(recipe: Recipe, path: Path) -> None:
    """Write `recipe` as YAML that `load_recipe` reads back to an equal recipe."""
    path.write_text(yaml.safe_dump(recipe.to_dict(), sort_keys=False), encoding="utf-8")
