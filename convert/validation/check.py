"""Checks values against the types and bounds that a settings class declares: pydantic's checks, our messages."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from mhconvert.errors import MhconvertError

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
            return self.message
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
        if self.message is not None:
            return self.message
        return f"{'.'.join((*keys, self.field))}: {shown(self.value)} is not {self.expected}"


def check(kind: Any, values: Mapping[str, Any], *, finite: bool) -> tuple[dict[str, Any], list[Fault]]:
    """Return the values in their declared types, and a Fault for each that does not fit.

    Args:
        kind: The settings class.
        values: Values by field name.
        finite: NaN and infinities count as values of the wrong type, not as values out of bounds.
    """
    taken, faults = {}, []
    for name, value in values.items():
        field = declared(kind)[name]
        holds = {get_origin(each) for each in _kinds(field.hint)} & {list, tuple, dict, Sequence}
        entries = _entries(value) if holds else {}
        wrong = next((key for key, entry in entries.items() if isinstance(entry, bool)), None)
        if wrong is not None:  # pydantic takes true for 1
            keys = (str(wrong),)
            faults.append(Fault(name, keys, entries[wrong], expected(_entry(field.hint, keys))))
            continue
        try:
            found = _adapter(kind, name).validate_python(value)
        except _Mistyped as error:
            faults += list(_faults(field, value, error.errors, finite))
            continue
        if finite and isinstance(found, float) and field.hint is not Any and not math.isfinite(found):
            faults.append(Fault(name, (), value, expected(field.hint, field.option.also)))
        else:  # an int stays one, so that a recipe's hash and its YAML do not change
            taken[name] = _as_given(value, found)
    return taken, faults


def _entries(value: Any) -> dict[Any, Any]:
    """Return the entries of a list or mapping by number or key; {} for other values."""
    if isinstance(value, dict):
        return value
    return dict(enumerate(value)) if isinstance(value, (list, tuple)) else {}


def _as_given(value: Any, found: Any) -> Any:
    """Return `found` with an int where an int was given for a float, also inside a mapping."""
    if isinstance(value, dict) and isinstance(found, dict) and value.keys() == found.keys():
        return {name: _as_given(value[name], entry) for name, entry in found.items()}
    return value if type(value) is int and isinstance(found, float) else found


class _Mistyped(Exception):
    def __init__(self, errors: list[Any]) -> None:
        self.errors = errors


class _Adapter:
    """pydantic's validator of one field."""

    def __init__(self, hint: Any) -> None:
        from pydantic import BeforeValidator, TypeAdapter

        kinds = _kinds(hint)
        if {int, float} & kinds and not {bool, str} & kinds:
            hint = Annotated[hint, BeforeValidator(_number)]
        self._adapter: Any = TypeAdapter(hint, config={"strict": bool in kinds})

    def validate_python(self, value: Any) -> Any:
        from pydantic import ValidationError

        try:
            return self._adapter.validate_python(value)
        except ValidationError as error:
            raise _Mistyped(error.errors(include_url=False)) from None


@cache
def _adapter(kind: Any, name: str) -> _Adapter:
    return _Adapter(get_type_hints(kind, include_extras=True)[name])


def _kinds(hint: Any) -> set[Any]:
    """Return the type, or the types of a union."""
    if get_origin(hint) is Annotated:
        hint = get_args(hint)[0]
    return {hint, *get_args(hint)}


def _number(value: Any) -> Any:
    """Return the number that text spells (YAML 1.1 reads 1e-3 as text), other values unchanged; refuse bools."""
    from pydantic_core import PydanticCustomError

    if isinstance(value, bool):
        raise PydanticCustomError("number_type", "a bool is no number")
    if isinstance(value, str):
        try:
            number = float(value)
        except ValueError:
            return value
        return int(number) if math.isfinite(number) and number == int(number) else number
    return value


def _faults(field: Declared, value: Any, errors: list[Any], finite: bool) -> Iterator[Fault]:
    """Yield the fault of one value; of a union's branches, the one that matches deepest."""
    option = field.option
    deepest: tuple[Keys, Any] = ((), value)
    for error in errors:
        keys, inner = _walk(value, error["loc"])
        own = (error.get("ctx") or {}).get("error")
        if error["type"] in OUT_OF_BOUNDS:
            number = _number(inner)
            if not finite or math.isfinite(number):
                yield Fault(field.name, (), value, "", option.out_of_range(field.name, number))
                return
        if error["loc"][-1:] == ("[key]",):
            yield Fault(field.name, keys, error["loc"][-2], "text")
            return
        if own is not None:
            raised = type(own.__cause__)
            yield Fault(field.name, keys, inner, "", str(own), raised)
            return
        deepest = max(deepest, (keys, inner), key=lambda place: len(place[0]))
    words = expected(_entry(field.hint, deepest[0]), option.also if not deepest[0] else None)
    yield Fault(field.name, deepest[0], deepest[1], words)


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
