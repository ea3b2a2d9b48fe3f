"""Overrides of a recipe's values from the command line: `--set heal.tokens=1B`."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import yaml

from mhconvert.errors import RecipeError

from ..convert.storage.bounded_yaml import PlainLoader
from ..convert.validation.yaml_file import Document, Keys, Origins


def apply(document: Document, overrides: Sequence[str]) -> Document:
    """Return the document with each `key.sub=value` applied in order; the values are YAML.

    A mapping that is missing or null is created for a key that goes into it; null removes a stage. The origin of a
    value that was set is the override. Whether the recipe has such a key is checked by the reader of the document.

    Raises:
        RecipeError: An override is not key=value, has no value, or goes into something that is not a mapping.
    """
    values, places = copy.deepcopy(document.values), dict(document.origins.places)
    for text in overrides:
        keys, value = parsed(text)
        inner = values
        for depth, key in enumerate(keys[:-1], start=1):
            if inner.get(key) is None:
                inner[key] = {}
                places[keys[:depth]] = f"--set {text}"
            if not isinstance(inner[key], dict):
                raise RecipeError(f"--set {text}: {'.'.join(keys[:depth])} is not a mapping of settings")
            inner = inner[key]
        inner[keys[-1]] = value
        places = {old: place for old, place in places.items() if old[: len(keys)] != keys}
        places[keys] = f"--set {text}"
    return Document(values, Origins(places))


def parsed(text: str) -> tuple[Keys, Any]:
    """(("heal", "tokens"), "1B") from "heal.tokens=1B". Raises RecipeError for what is not key=value."""
    name, equals, written = text.partition("=")
    keys = tuple(word.strip() for word in name.split("."))
    if not equals or not all(keys):
        raise RecipeError(f"--set {text} is not key=value; for example heal.tokens=1B")
    if not written.strip():
        raise RecipeError(f"--set {text} has no value; null is the value of what is to be left out")
    try:
        return keys, yaml.load(written, PlainLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        problem = " ".join(str(getattr(error, "problem", None) or error).split())
        raise RecipeError(f"--set {text} cannot be read: {problem}") from error
