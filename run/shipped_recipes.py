"""The recipes that ship with the package."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from mhconvert.errors import RecipeError

from ..convert.storage.regular_file import require_regular
from ..convert.validation import yaml_file
from .whole_recipe import RunRecipe

SUFFIX = ".yaml"


@dataclass(frozen=True)
class Entry:
    """A recipe in a list. about: the first line of its comment. settings: the method's, as the file has them."""

    name: str
    about: str
    model: str
    method: str
    settings: dict[str, Any]
    stages: tuple[str, ...]


def names() -> list[str]:
    """Return the names of the shipped recipes, sorted, without suffix."""
    return sorted(path.stem for path in _folder().glob(f"*{SUFFIX}"))


def find(name_or_path: str) -> Path:
    """Return the file of a recipe: a path, or a shipped recipe's name with or without `recipes/` and `.yaml`.

    Raises:
        RecipeError: There is neither; the message has the names that are similar.
    """
    path = Path(name_or_path).expanduser()
    if not path.is_dir():  # of the name of one that ships
        require_regular(path, RecipeError)
    if path.is_file():
        return path
    name = name_or_path.removeprefix("recipes/").removesuffix(SUFFIX)
    known = names()
    if name in known:
        return _folder() / f"{name}{SUFFIX}"
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.6) or [n for n in known if n.startswith(name)]
    hint = (
        f"did you mean {' or '.join(near[:3])}?" if near else "'mhconvert recipes list' names those that ship"
    )
    raise RecipeError(f"there is no recipe '{name_or_path}', neither a file nor one that ships; {hint}")


def entry(path: Path) -> Entry:
    """Return what `recipes list` shows of a recipe's file. Raises RecipeError where it is not a recipe."""
    document = yaml_file.read(path)
    recipe = RunRecipe.from_dict(document.values, document.origins)
    comment = path.read_text(encoding="utf-8").partition("\n")[0]
    return Entry(
        name=path.stem,
        about=comment.lstrip("# ").strip() if comment.startswith("#") else "",
        model=recipe.convert.model,
        method="+".join(step.method for step in (recipe.convert.methods or recipe.convert.passes)),
        settings=_settings(document.values),
        stages=recipe.stages,
    )


def _settings(values: dict[str, Any]) -> dict[str, Any]:
    """The settings in a recipe's file; of a chain those of all steps, each key with its method in front."""
    if "methods" not in values:
        return values.get("settings") or {}
    return {
        f"{step['method']}.{name}": value
        for step in values["methods"]
        for name, value in (step.get("settings") or {}).items()
    }


def _folder() -> Path:
    return Path(str(files("mhconvert.recipes")))
