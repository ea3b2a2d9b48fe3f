"""Values against the types and bounds that a settings class declares. pydantic checks; the messages are ours."""

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
    """One value that does not fit. inner: where in the field's value it is, as keys; out_of_bounds: its type is right.

    message: of a parser or of the bounds, complete; None: the type is wrong, and `expected` says what belongs there.
    error: what the parser raised.
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
    """The `values` of the settings class `kind` in their declared types, and a Fault for each that does not fit.

    finite: NaN and infinities have the wrong type; otherwise they are out of bounds.
    """
    taken, faults = {}, []
    for name, value in values.items():
        field = declared(kind)[name]
        try:
            taken[name] = _adapter(kind, name).validate_python(value)
        except _Mistyped as error:
            faults += list(_faults(field, value, error.errors, finite))
    return taken, faults


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
    """The type and, of a union, the types that it may be."""
    if get_origin(hint) is Annotated:
        hint = get_args(hint)[0]
    return {hint, *get_args(hint)}


def _number(value: Any) -> Any:
    """The number that text says (YAML 1.1 reads 1e-3 as text); anything else stays what it is, but no bool is one."""
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
    """The faults of one value; the branches of a union give one, where the value fits deepest."""
    option = field.option
    deepest: tuple[Keys, Any] = ((), value)
    for error in errors:
        keys, inner = _walk(value, error["loc"])
        own = (error.get("ctx") or {}).get("error")
        if error["type"] in OUT_OF_BOUNDS and not (finite and not math.isfinite(inner)):
            yield Fault(field.name, (), value, "", option.out_of_range(field.name, inner))
            return
        if own is not None:
            raised = type(own.__cause__)
            yield Fault(field.name, keys, inner, "", str(own), raised)
            return
        deepest = max(deepest, (keys, inner), key=lambda place: len(place[0]))
    words = expected(_entry(field.hint, deepest[0]), option.also if not deepest[0] else None)
    yield Fault(field.name, deepest[0], deepest[1], words)


def _walk(value: Any, location: tuple[Any, ...]) -> tuple[Keys, Any]:
    """Where pydantic's location lies in `value`: its parts that name a union's branch are passed over."""
    keys: Keys = ()
    for part in location:
        if (isinstance(value, dict) and part in value) or (
            isinstance(value, (list, tuple)) and isinstance(part, int) and part < len(value)
        ):
            keys, value = (*keys, str(part)), value[part]
    return keys, value


def _entry(hint: Any, keys: Keys) -> Any:
    """The type of an entry at `keys` inside a value of type `hint`."""
    for _ in keys:
        kinds = [hint, *get_args(hint)]
        holding = (list, tuple, dict, Sequence)
        outer = next((kind for kind in kinds if get_origin(kind) in holding), hint)
        arguments = [kind for kind in get_args(outer) if kind not in (Ellipsis, type(None))]
        hint = arguments[-1] if arguments else hint
    return hint


def shown(value: Any) -> str:
    """A value as a message shows it: YAML's words for None and bools, and not too long."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = repr(value)
    return text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + "…"
