"""Checks values against the types and bounds that a settings class declares: pydantic's checks, our messages."""

from __future__ import annotations

import math
import re
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import PurePath
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

from mhconvert.errors import MhconvertError

from ..storage.unicode_text import lone_surrogate
from .option import Declared, declared, expected

Keys = tuple[str, ...]  # from the outermost mapping inwards; an entry of a list by its number
SHOWN_CHARACTERS = 60
OUT_OF_BOUNDS = ("greater_than", "greater_than_equal", "less_than", "less_than_equal")


@dataclass(frozen=True)
class Fault:
    """One value that does not fit its declaration.

    Args:
        field: Name of the field.
        inner: Keys of the faulty entry inside the field's value; () for the value itself.
        value: What was given.
        expected: The type that belongs there, in words.
        message: A complete message, of a parser or about bounds; None: the type is wrong.
        error: The class of the error that a parser raised.
    """

    field: str
    inner: Keys
    value: Any
    expected: str
    message: str | None = None
    error: type[MhconvertError] | None = None

    def of_field(self) -> str:
        """The message of a constructor's argument: "lr='fast' is not a number"."""
        if self.message is not None:
            return self._named(self.field)
        if self.expected == "true or false":
            return f"{self.field}={self.value!r} is neither true nor false"
        if self.expected.startswith("one of"):
            return f"{self.field} '{self.value}' is not {self.expected}"
        if self.expected.startswith("a mapping"):
            return f"{self.field}: {self.value} is not {self.expected}"
        entry = "".join(f", entry {key}" for key in self.inner)
        return f"{self.field}{entry}={self.value!r} is not {self.expected}"

    def at(self, keys: Keys) -> str:
        """The message of a value in a file: "settings.kv_budget: 'many' is not a number"."""
        key = ".".join((*keys, self.field))
        return (
            f"{key}: {shown(self.value)} is not {self.expected}" if self.message is None else self._named(key)
        )

    def _named(self, key: str) -> str:
        """Return `message` with the key in place of the field's name at its beginning, or else before it."""
        message = self.message or ""
        named = re.match(rf"{self.field}\b", message)
        return f"{key}{message[named.end() :]}" if named else f"{key}: {message}"


def check(kind: Any, values: Mapping[str, Any], *, finite: bool) -> tuple[dict[str, Any], list[Fault]]:
    """Return the values in their declared types, and a Fault for each that does not fit.

    Args:
        kind: The settings class.
        values: Values by field name; paths count as text, and numpy's numbers as Python's.
        finite: NaN and infinities count as values of the wrong type, not as values out of bounds.
    """
    from pydantic import ValidationError

    taken, faults = {}, []
    for name, given in values.items():
        value = _plain(given)
        if (fault := _surrogate(name, value)) is not None:
            faults.append(fault)
            continue
        try:
            taken[name] = _validator(kind, name).validate_python(value, context=finite)
        except ValidationError as error:
            faults.append(_fault(declared(kind)[name], value, error.errors(include_url=False)))
    return taken, faults


def _surrogate(name: str, value: Any) -> Fault | None:
    """Return the fault of text that no file can hold, in the value or among its entries."""
    entries = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, (list, tuple))
        else ()
    )
    for keys, text in [
        ((), value),
        *(((str(key),), part) for key, entry in entries for part in (key, entry)),
    ]:
        if isinstance(text, str) and (words := lone_surrogate(text)) is not None:
            return Fault(name, keys, text, "text", f"{name}={text!r}: {words}")
    return None


def _plain(value: Any) -> Any:
    """Return the value, or the entries of a list or mapping, in Python's own types."""
    if isinstance(value, dict):
        return {name: _plain_entry(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(_plain_entry, value))
    return _plain_entry(value)


def _plain_entry(value: Any) -> Any:
    if isinstance(value, PurePath):
        return str(value)
    return value.item() if getattr(value, "shape", None) == () else value


@cache
def _validator(kind: Any, name: str) -> Any:
    """pydantic's validator of one field."""
    from pydantic import TypeAdapter

    return TypeAdapter(_validated(get_type_hints(kind, include_extras=True)[name]))


def _validated(hint: Any, *, inside: bool = False) -> Any:
    """Return a type with our validators of numbers, bools and (inside a list or mapping) names.

    `int | float` becomes `float`, which keeps an int as it is.
    """
    from pydantic import Strict, StringConstraints, WrapValidator

    origin, arguments = get_origin(hint), get_args(hint)
    if hint in (int, float):
        return Annotated[hint, WrapValidator(_number)]
    if hint is bool:
        return Annotated[bool, Strict()]
    if hint is str and inside:
        return Annotated[str, StringConstraints(min_length=1)]
    if origin is Annotated:
        return Annotated[(_validated(arguments[0]), *hint.__metadata__)]
    if origin in (Union, types.UnionType):
        kinds = [kind for kind in arguments if kind is not int or float not in arguments]
        return Union[tuple(map(_validated, kinds))]  # noqa: UP007  # of a tuple
    if origin in (list, tuple, dict, Sequence):
        return origin[tuple(kind if kind is ... else _validated(kind, inside=True) for kind in arguments)]
    return hint


def _number(value: Any, validate: Any, info: Any) -> Any:
    """Return a number, also of text (YAML 1.1 reads 1e-3 as text); refuse bools, and what is not finite in a file.

    An int stays one where a float belongs, so that a recipe's hash and its YAML do not change.
    """
    from pydantic_core import PydanticCustomError

    number = value
    if isinstance(value, str):
        try:
            number = float(value)
        except ValueError:
            number = None
        else:
            number = int(number) if number.is_integer() else number
    if isinstance(number, bool) or (info.context and isinstance(number, float) and not math.isfinite(number)):
        raise PydanticCustomError("number_type", "no number")
    found = validate(number)
    return value if type(value) is int else found


def _fault(field: Declared, value: Any, errors: list[Any]) -> Fault:
    """Return the fault of one value; of a union's branches, the one that matches deepest."""
    option = field.option
    deepest: tuple[Keys, Any] = ((), value)
    for error in errors:
        keys, inner = _walk(value, error["loc"])
        own = (error.get("ctx") or {}).get("error")
        if error["type"] in OUT_OF_BOUNDS:
            return Fault(field.name, (), value, "", option.out_of_range(field.name, error["input"]))
        if error["type"] == "string_too_short":
            return Fault(field.name, keys, inner, "", f"{field.name} has an empty name")
        if error["loc"][-1:] == ("[key]",):
            return Fault(field.name, keys, error["loc"][-2], "text")
        if own is not None:
            return Fault(field.name, keys, inner, "", str(own), type(own.__cause__))
        deepest = max(deepest, (keys, inner), key=lambda place: len(place[0]))
    words = expected(_entry(field.hint, deepest[0]), option.also if not deepest[0] else None)
    return Fault(field.name, deepest[0], deepest[1], words)


def _walk(value: Any, location: tuple[Any, ...]) -> tuple[Keys, Any]:
    """Return the keys and the entry at pydantic's location, without the parts that name a union's branch."""
    keys: Keys = ()
    for part in location:
        if (isinstance(value, dict) and part in value) or (
            isinstance(value, (list, tuple)) and isinstance(part, int) and part < len(value)
        ):
            keys, value = (*keys, str(part)), value[part]
    return keys, value


def _entry(hint: Any, keys: Keys) -> Any:
    """Return the type of an entry at `keys` inside a value of type `hint`."""
    for _ in keys:
        kinds = [hint, *get_args(hint)]
        holding = (list, tuple, dict, Sequence)
        outer = next((kind for kind in kinds if get_origin(kind) in holding), hint)
        arguments = [kind for kind in get_args(outer) if kind not in (Ellipsis, type(None))]
        hint = arguments[-1] if arguments else hint
    return hint


def shown(value: Any) -> str:
    """Return a value as messages show it: null, true and false as in YAML, long values cut."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = repr(value)
    return text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + "…"
