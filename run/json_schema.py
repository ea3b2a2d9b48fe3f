"""The JSON Schema of a recipe's file, generated from the declarations of its settings."""

from __future__ import annotations

from typing import Any

from ..convert.methods.registry import METHOD_NAMES, settings_class
from ..convert.recipe.heal_settings import HealSettings
from ..convert.recipe.recipe import Calibration, Recipe
from ..convert.recipe.steps import Step
from ..convert.validation.option import Declared, declared
from .whole_recipe import KINDS

DRAFT = "https://json-schema.org/draft/2020-12/schema"
Schema = dict[str, Any]


def schema() -> Schema:
    """Return the schema of what `whole_recipe.load` accepts; `settings` depends on the method that the recipe names.

    It does not cover fields that depend on each other, and numbers written as text (1e-3 is text in YAML 1.1).
    """
    from pydantic import TypeAdapter

    kinds = [Recipe, Step, Calibration, HealSettings, *KINDS.values(), *map(settings_class, METHOD_NAMES)]
    _, whole = TypeAdapter.json_schemas([(kind, "validation", TypeAdapter(kind)) for kind in kinds])
    definitions = {name: _plain(mapping) for name, mapping in whole["$defs"].items()}
    for kind in kinds:
        _complete(definitions[kind.__name__], declared(kind))
    root = definitions.pop("Recipe")
    properties = root["properties"]
    for name, kind in KINDS.items():
        properties[name] = {"anyOf": [_reference(kind), {"type": "null"}], "description": kind.__doc__}
    root["oneOf"] = [_given("method", "string", "methods"), _given("methods", "array", "method", "settings")]
    for step in (root, definitions["Step"]):
        step["properties"]["method"] = {"enum": list(METHOD_NAMES)} | step["properties"]["method"]
        step["properties"]["method"].pop("default", None)
        step["allOf"] = _settings_by_method()
    properties["method"] = _or_null(properties["method"])
    properties["methods"] = _or_null(properties["methods"] | {"minItems": 2})
    return {"$schema": DRAFT, "title": "A recipe of mhconvert", **root, "$defs": definitions}


def _given(name: str, kind: str, *others: str) -> Schema:
    """That `name` has a value of the JSON type `kind`, and none of `others` has one; null is none."""
    kinds = {name: kind} | dict.fromkeys(others, "null")
    return {"required": [name], "properties": {key: {"type": each} for key, each in kinds.items()}}


def _settings_by_method() -> list[Schema]:
    """What `settings` has, by the method beside it."""
    return [
        {
            "if": {"properties": {"method": {"const": name}}, "required": ["method"]},
            "then": {
                "properties": {"settings": {"anyOf": [_reference(settings_class(name)), {"type": "null"}]}}
            },
        }
        for name in METHOD_NAMES
    ]


def _reference(kind: Any) -> Schema:
    return {"$ref": f"#/$defs/{kind.__name__}"}


def _plain(node: Any) -> Any:
    """Return the schema without pydantic's titles, which repeat the keys."""
    if isinstance(node, dict):
        return {
            key: _plain(value) for key, value in node.items() if key != "title" or not isinstance(value, str)
        }
    return [_plain(entry) for entry in node] if isinstance(node, list) else node


def _complete(mapping: Schema, fields: dict[str, Declared]) -> None:
    """Refuse unknown keys, and accept null for a field whose default is None."""
    mapping["additionalProperties"] = False
    for name, field in fields.items():
        known = mapping["properties"][name]
        if field.default is None and {"type": "null"} not in known.get("anyOf", []) and len(known) > 1:
            mapping["properties"][name] = _or_null(known)


def _or_null(known: Schema) -> Schema:
    described = {key: known.pop(key) for key in ("description", "default") if key in known}
    return {"anyOf": [known, {"type": "null"}]} | described
