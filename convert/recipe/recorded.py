"""Recipes that a conversion saved, as today's settings read them. Imports no torch.

A recipe that lacks a field has that field's default; one that an earlier version saved has what was done then.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from ..methods.registry import METHOD_NAMES, settings_class
from ..validation import yaml_file
from ..validation.yaml_file import Document

SAVED, RECORD = "recipe.yaml", "mhconvert.json"  # a conversion writes both into its folder

NOT_THE_RESULT = ("output", "verify")  # keys of a recipe that change nothing of what is made


def as_recorded(values: Any) -> Any:
    """The plain values of a saved recipe, its methods' settings completed by what they meant when they were saved.

    Values that are no recipe come back as they are; arguments are not changed.
    """
    if isinstance(values, dict) and isinstance(values.get("methods"), list):
        return values | {"methods": [as_recorded(step) for step in values["methods"]]}
    method = values.get("method") if isinstance(values, dict) else None
    if method not in tuple(METHOD_NAMES) or not isinstance(values.get("settings"), dict):
        return values
    return values | {"settings": settings_class(method).earlier | values["settings"]}


def last_step(values: dict[str, Any]) -> dict[str, Any]:
    """Of a saved recipe the mapping with the method and the settings of what was done last."""
    return (values.get("methods") or [values])[-1]  # type: ignore[no-any-return]


def read_recipe(path: Path) -> Document:
    """The document of a recipe's file; what a conversion saved in its folder means what it meant then.

    Raises:
        RecipeError: As `yaml_file.read`.
    """
    document = yaml_file.read(path)
    if path.name == SAVED and path.with_name(RECORD).is_file():
        return Document(as_recorded(document.values), document.origins)
    return document


def save_values(values: dict[str, Any], path: Path) -> None:
    """Write the plain values of a recipe as YAML."""
    path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
