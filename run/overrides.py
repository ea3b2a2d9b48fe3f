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

    A mapping that is missing or null is created for a key that goes into it; null removes a stage; a step of `methods`
    is named by its number from 0: methods.1.settings.active=0.5. The origin of a value that was set is the override.
    Whether the recipe has such a key is checked by the reader of the document.

    Raises:
        RecipeError: An override is not key=value, has no value, or goes into something that is not a mapping.
    """
    values, places = copy.deepcopy(document.values), dict(document.origins.places)
    for text in overrides:
        keys, value = parsed(text)
        inner: Any = values
        for depth, key in enumerate(keys[:-1], start=1):
            if isinstance(inner, dict) and inner.get(key) is None:
                inner[key] = {}
                places[keys[:depth]] = f"--set {text}"
            inner = inner[int(key)] if isinstance(inner, list) else inner[key]
            if not isinstance(inner, dict) and not _has_step(inner, keys[depth:]):
                raise RecipeError(f"--set {text}: {'.'.join(keys[:depth])} is not a mapping of settings")
        inner[keys[-1]] = value
        places = {old: place for old, place in places.items() if old[: len(keys)] != keys}
        places[keys] = f"--set {text}"
    return Document(values, Origins(places))


def _has_step(found: Any, keys: Keys) -> bool:
    """Whether `found` is a list in which the first of `keys`, a number from 0, is a mapping for the next of them."""
    number = int(keys[0]) if keys[0].isdecimal() else None
    return isinstance(found, list) and number is not None and len(keys) > 1 and number < len(found)


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
