"""What each stage of a run reads, as hashes: a stage is repeated when any of them changes."""

from __future__ import annotations

import glob
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..convert.storage.atomic_files import sha256
from .ledger import mark
from .whole_recipe import RunRecipe

ELSEWHERE = ("output", "device", "verify", "max_shard_size")  # keys that do not change what a model is
BEHIND = ("heal", "eval", "export", "push")  # of the recipe: the stages after the conversion


def of_conversion(recipe: RunRecipe) -> dict[str, Any]:
    """Hashes for the conversion: its part of the recipe, the donor's local files, the calibration text, prompts."""
    plain = recipe.convert.part(len(recipe.convert.passes)).to_dict()  # without an adapter behind it
    words = {key: value for key, value in plain.items() if key not in (*ELSEWHERE, *BEHIND)}
    return {
        "recipe": words,
        "donor": model_mark(recipe.convert.model),
        "text": files((*recipe.convert.calibration.sources, *filter(None, (recipe.convert.prompts,)))),
    }


def of_healing(recipe: RunRecipe) -> dict[str, Any]:
    """Hashes for healing: the teacher's local files and the text."""
    heal = recipe.convert.heal
    assert heal is not None
    return {"teacher": model_mark(heal.teacher or recipe.convert.model), "text": files(heal.data)}


def of_evaluation(recipe: RunRecipe) -> dict[str, Any]:
    """Hashes for the evaluation: the donor's local files, texts, prompts, folders of tasks and of their data."""
    stage = recipe.eval
    assert stage is not None
    folders = [folder for folder in (stage.data, stage.include_path) if folder]
    return {
        "donor": model_mark(recipe.convert.model),
        "text": files(stage.text),
        "asked": files(filter(None, (stage.prompts, stage.requests))),
        "folders": files(f"{Path(folder).expanduser()}/**/*" for folder in folders),
    }


def model_mark(reference: str) -> str | None:
    """Return the hash of a local model; None for a Hub model, which its name and revision identify."""
    path = Path(reference).expanduser()
    return mark(path) if path.exists() else None


def files(sources: Iterable[str]) -> dict[str, str]:
    """Return the SHA-256 of each file that `sources` name by path or glob; datasets and `self` have none."""
    found: dict[str, str] = {}
    for source in sources:
        pattern = str(Path(source).expanduser())
        names = [pattern] if Path(pattern).is_file() else sorted(glob.glob(pattern, recursive=True))
        found |= {name: sha256(Path(name)) for name in names if Path(name).is_file()}
    return found
