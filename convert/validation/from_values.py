"""Dataclasses of settings from plain values, checked against their annotations; every fault names the key."""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from mhconvert.errors import MhconvertError

from .field_types import Also
from .yaml_file import Keys, Origins

PLAIN = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
SHOWN_CHARACTERS = 60


class _WrongType(Exception):
    """`value`, at `keys`, is not a `hint`."""

    def __init__(self, value: Any, hint: Any, keys: Keys) -> None:
        self.value, self.hint, self.keys = value, hint, keys


def build(
    kind: Any,
    values: Mapping[str, Any],
    origins: Origins,
    keys: Keys = (),
    *,
    hints: Mapping[str, Any] | None = None,
    beside: Collection[str] = (),
) -> Any:
    """The dataclass `kind` from `values`, which stand at `keys`; dataclasses inside it from inner mappings.

    Text that is a number, as YAML reads 1e-3, is one where a number belongs. hints: instead of the annotations.
    beside: keys that belong to others, and are named among those that there are. Raises RecipeError for an unknown or
    missing key and a wrong type, and what `kind` itself raises with the origin before it.
    """
    fields = {field.name: field for field in dataclasses.fields(kind)}
    known = get_type_hints(kind, include_extras=True) | dict(hints or {})
    place = ".".join(keys)
    for name in values:
        if name not in fields:
            what = f"{place or 'recipe'} has no key '{name}'; "
            raise origins.fault((*keys, str(name)), what + _instead(str(name), known, beside))
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in values:
            raise origins.fault(keys, f"{place or 'recipe'}: the key '{name}' is missing")
    taken = {}
    for name, value in values.items():
        if value is None and fields[name].default is None:
            continue
        try:
            taken[name] = _take(value, known[name], (*keys, name), origins)
        except _WrongType as wrong:
            key = ".".join((*keys, name))
            message = f"{key}: {_shown(wrong.value)} is not {expected(wrong.hint)}"
            raise origins.fault(wrong.keys, message) from None
    try:
        return kind(**taken)
    except MhconvertError as error:
        blamed = origins.blame(error, keys, values)
        if blamed is error:
            raise
        raise blamed from error


def expected(hint: Any) -> str:
    """What a value has to be, in words: "a whole number or text"."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return " or ".join(expected(kind) for kind in (arguments[0], *_also(hint)))
    if origin in (Union, types.UnionType):
        words = dict.fromkeys(expected(kind) for kind in arguments if kind is not type(None))
        if "a number" in words:
            words.pop("a whole number", None)
        return " or ".join(words)
    if origin is Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if origin in (list, tuple, Sequence):
        return "a list"
    if origin is dict:
        return f"a mapping of names to {'numbers' if arguments[1] is float else 'values'}"
    return PLAIN.get(hint, "a mapping of settings")


def dataclass_in(hint: Any) -> Any:
    """The dataclass that a field of this annotation may be, or None."""
    return next((kind for kind in (hint, *get_args(hint)) if dataclasses.is_dataclass(kind)), None)


def _also(hint: Any) -> list[Any]:
    return [extra.kind for extra in hint.__metadata__ if isinstance(extra, Also)]


def _instead(name: str, hints: Mapping[str, Any], beside: Collection[str]) -> str:
    """The keys that `name` may have meant, also those a level further in, and those that there are."""
    known = sorted({*hints, *beside})
    inner = {outer: dataclass_in(hint) for outer, hint in hints.items()}
    deeper = [
        f"{outer}.{name}"
        for outer, kind in inner.items()
        if kind is not None and name in {field.name for field in dataclasses.fields(kind)}
    ]
    near = deeper or difflib.get_close_matches(name, known, n=2, cutoff=0.6)
    has = f"it has {', '.join(known)}"
    return f"did you mean {' or '.join(near)}? ({has})" if near else has


def _take(value: Any, hint: Any, keys: Keys, origins: Origins) -> Any:
    """`value` as the annotation `hint` wants it. Raises _WrongType, or RecipeError of a dataclass inside."""
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin is Annotated:
        return _first(value, (*_also(hint), arguments[0]), hint, keys, origins)
    if origin in (Union, types.UnionType):
        if type(value) in arguments:  # 1.0 of `int | float` stays what it is
            return value
        by_width = sorted(arguments, key=lambda kind: kind is int)  # "1e-3" is a float before it is an int
        return _first(value, by_width, hint, keys, origins)
    if origin is Literal and value in arguments:
        return value
    if origin in (list, tuple, Sequence) and isinstance(value, (list, tuple)):
        entries = [_take(e, arguments[0], (*keys, str(i)), origins) for i, e in enumerate(value)]
        return tuple(entries) if origin is tuple else entries
    if origin is dict and isinstance(value, dict):
        return {
            _take(name, arguments[0], (*keys, str(name)), origins): _take(
                entry, arguments[1], (*keys, str(name)), origins
            )
            for name, entry in value.items()
        }
    if dataclasses.is_dataclass(hint) and isinstance(value, dict):
        return build(hint, value, origins, keys)
    if hint in (int, float):
        return _number(value, hint, keys)
    if hint in (str, bool) and isinstance(value, hint):
        return value
    raise _WrongType(value, hint, keys)


def _first(value: Any, kinds: Sequence[Any], hint: Any, keys: Keys, origins: Origins) -> Any:
    """`value` as the first of `kinds` that it can be; else what is wrong with an entry of it, or with all of it."""
    deepest = _WrongType(value, hint, keys)
    for kind in kinds:
        try:
            return _take(value, kind, keys, origins)
        except _WrongType as wrong:
            deepest = wrong if len(wrong.keys) > len(deepest.keys) else deepest
    raise deepest


def _number(value: Any, kind: Any, keys: Keys) -> Any:
    if isinstance(value, (int, float, str)) and not isinstance(value, bool):
        with suppress(ValueError, OverflowError):
            if kind is int and isinstance(value, int):
                return value
            number = float(value)
            if kind is int and number == int(number):
                return int(number)
            if kind is float and math.isfinite(number):
                return number if isinstance(value, str) else value
    raise _WrongType(value, kind, keys)


def _shown(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = repr(value)
    return text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + "…"
