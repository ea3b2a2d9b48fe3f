"""The JSON Schema of a recipe's file, for editors, from the dataclasses that read it."""

from __future__ import annotations

import dataclasses
import inspect
import re
import types
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from ..convert.methods.registry import METHOD_NAMES, settings_class
from ..convert.recipe.recipe import Recipe
from ..convert.validation.field_types import Also
from .whole_recipe import KINDS

DRAFT = "https://json-schema.org/draft/2020-12/schema"
PLAIN = {int: "integer", float: "number", str: "string", bool: "boolean", type(None): "null"}
Schema = dict[str, Any]


def schema() -> Schema:
    """What `load` takes, but for ranges that depend on other values and numbers written as text (1e-3 in YAML 1.1).

    `settings` has the keys of the method that the recipe names.
    """
    definitions: dict[str, Schema] = {}
    root = _mapping(Recipe, definitions)
    for name, kind in KINDS.items():
        root["properties"][name] = _of(kind | None, definitions) | {"description": _spoken(kind)[0]}
    root["properties"]["method"]["enum"] = list(METHOD_NAMES)
    root["properties"]["settings"] = {"description": "What the method lets one choose."}
    root["allOf"] = [
        {
            "if": {"properties": {"method": {"const": name}}, "required": ["method"]},
            "then": {"properties": {"settings": _of(settings_class(name) | None, definitions)}},
        }
        for name in METHOD_NAMES
    ]
    return {"$schema": DRAFT, "title": "A recipe of mhconvert", **root, "$defs": definitions}


def _mapping(kind: Any, definitions: dict[str, Schema]) -> Schema:
    """The schema of a dataclass's mapping; dataclasses inside it go into `definitions`."""
    hints = get_type_hints(kind, include_extras=True)
    whole, described = _spoken(kind)
    properties, required = {}, []
    for field in dataclasses.fields(kind):
        made = field.default_factory
        default = field.default if made is dataclasses.MISSING else made()
        hint = hints[field.name]
        known = _of(hint | None if default is None and hint is not Any else hint, definitions)
        if field.name in described:
            known["description"] = described[field.name]
        if default is dataclasses.MISSING:
            required.append(field.name)
        elif not dataclasses.is_dataclass(default):
            known["default"] = list(default) if isinstance(default, tuple) else default
        properties[field.name] = known
    return {
        "description": whole,
        "type": "object",
        "properties": properties,
        "required": required,
        "additionalProperties": False,
    }


def _of(hint: Any, definitions: dict[str, Schema]) -> Schema:
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return {}
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        if hint.__name__ not in definitions:
            definitions[hint.__name__] = _mapping(hint, definitions)
        return {"$ref": f"#/$defs/{hint.__name__}"}
    if origin is Annotated:
        also = [extra.kind for extra in hint.__metadata__ if isinstance(extra, Also)]
        return _any([_of(kind, definitions) for kind in (arguments[0], *also)])
    if origin in (Union, types.UnionType):
        return _any([_of(kind, definitions) for kind in arguments])
    if origin is Literal:
        return {"enum": list(arguments)}
    if origin in (list, tuple, Sequence):
        return {"type": "array", "items": _of(arguments[0], definitions)}
    if origin is dict:
        return {"type": "object", "additionalProperties": _of(arguments[1], definitions)}
    return {"type": PLAIN[hint]}


def _any(kinds: list[Schema]) -> Schema:
    flat = [inner for kind in kinds for inner in (kind["anyOf"] if list(kind) == ["anyOf"] else [kind])]
    return {"anyOf": flat}


def _spoken(kind: Any) -> tuple[str, dict[str, str]]:
    """What the docstring says of the whole, and of each field: "name, other: text." speaks of both."""
    text = " ".join((inspect.getdoc(kind) or "").split())
    name = "(?:" + "|".join(field.name for field in dataclasses.fields(kind)) + ")"
    heads = list(re.finditer(rf"(?:^|(?<=[.;] ))({name}(?:, {name})*)(?:: | (?=\"))", text))
    ends = [head.start() for head in heads[1:]] + [len(text)]
    found = {
        field: text[head.end() : end].strip().rstrip(";")
        for head, end in zip(heads, ends, strict=True)
        for field in head[1].split(", ")
    }
    return text[: heads[0].start()].strip() if heads else text, found
