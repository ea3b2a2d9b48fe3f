"""The declaration of an option, which stands beside the field of a settings class.

    kv_budget: Annotated[float, Option("Share of the donor's KV cache to keep.", "SHARE", gt=0, le=1)] = 0.5

Command-line flags, YAML keys, the JSON Schema, error messages and the option tables of the documentation are made from
it. Importing this module does not import pydantic, which is needed only when a value is checked.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import PurePath
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    Generic,
    Literal,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

from mhconvert.errors import MhconvertError

Names = str | PurePath | Sequence[str | PurePath]  # what a field of names takes
Held = TypeVar("Held", covariant=True)
Given = TypeVar("Given", contravariant=True)

if TYPE_CHECKING:

    class Takes(Generic[Held, Given]):
        """The type of a field that holds a `Held` and whose constructor also takes what `Given` says.

        Editors and type checkers read a dataclass's constructor from `__set__`; at run time `Takes[H, G]` is `H`.
        """

        def __get__(self, settings: Any, kind: Any = None) -> Held: ...
        def __set__(self, settings: Any, value: Given) -> None: ...

else:

    class Takes:
        """See above."""

        def __class_getitem__(cls, kinds: tuple[Any, Any]) -> Any:
            return kinds[0]


def default(value: Any) -> Any:
    """Return the value; a type checker would not take it for a `Takes`, whose default it is."""
    return value


@dataclass(frozen=True)
class Option:
    """What a field of a settings class means, and which values it may have.

    Args:
        help: One or two sentences for users, without the name of the option.
        unit: What a value counts, in capitals as the command line shows it: SHARE, N, FILE.
        gt, ge, lt, le: Bounds of a number.
        range_hint: What follows "name=value " in the message about a number out of bounds; None: the bounds.
        parse: Turns what else a user may write (text, a plain list) into the type of the field; raises
            `MhconvertError` for what it cannot read. None: only the field's own type is taken.
        also: The types that `parse` takes beside the field's own; type checkers learn them from `Takes`.
        flag: Spelling on the command line; None: the field's name with dashes; "": not on the command line.
        default: What happens when the option is left out and the field's default does not say it.
        repeat: The command line takes the option several times, one entry each.
        words: Of text, what the command line takes; files may say it in other ways.
        flag_help: The help of the flag, where the flag means the opposite of the field (--no-verify).
    """

    help: str
    unit: str = ""
    gt: float | None = None
    ge: float | None = None
    lt: float | None = None
    le: float | None = None
    range_hint: str | None = None
    parse: Callable[[Any], Any] | None = None
    also: Any = None
    flag: str | None = None
    default: str = ""
    repeat: bool = False
    words: tuple[str, ...] = ()
    flag_help: str = ""

    @property
    def bounds(self) -> dict[str, float]:
        """The bounds that are set, by pydantic's names."""
        values = {name: getattr(self, name) for name in ("gt", "ge", "lt", "le")}
        return {name: value for name, value in values.items() if value is not None}

    def out_of_range(self, name: str, value: Any) -> str:
        """Return the message about a number that is out of bounds."""
        if self.range_hint is not None:
            return f"{name}={value} {self.range_hint}"
        low = f"[{self.ge:g}" if self.ge is not None else f"({self.gt:g}" if self.gt is not None else "(-∞"
        high = f"{self.le:g}]" if self.le is not None else f"{self.lt:g})" if self.lt is not None else "∞)"
        if high == "∞)" and self.ge is not None:
            return f"{name}={value} is too small; use at least {self.ge:g}"
        return f"{name}={value} is outside {low}, {high}"

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        from pydantic_core import core_schema

        inner = handler(source)
        if self.bounds:
            inner = _bounded(inner, self.bounds)
        if self.parse is None:
            return inner
        kinds, parse = get_args(self.also) or (self.also,), self.parse
        plain = tuple(get_origin(kind) or kind for kind in kinds)

        def read(value: Any) -> Any:
            try:
                return parse(value) if isinstance(value, plain) and not isinstance(value, bool) else value
            except MhconvertError as error:
                raise ValueError(str(error)) from error

        return core_schema.no_info_before_validator_function(read, inner)

    def __get_pydantic_json_schema__(self, core: Any, handler: Any) -> dict[str, Any]:
        schema = handler(core)
        if self.also is not None:
            from pydantic import TypeAdapter

            also = TypeAdapter(self.also).json_schema()
            schema = {"anyOf": [*schema.get("anyOf", [schema]), *also.get("anyOf", [also])]}
        return schema | {"description": self.help}


def _bounded(schema: dict[str, Any], bounds: dict[str, float]) -> dict[str, Any]:
    """Return the core schema with bounds on its number; None stays allowed where it was."""
    if schema["type"] in ("nullable", "function-wrap"):
        return schema | {"schema": _bounded(schema["schema"], bounds)}
    return schema | bounds


@dataclass(frozen=True)
class Declared:
    """A field of a settings class: its name, its type without the option, its default, and the option.

    The default of a field that holds settings is their class.
    """

    name: str
    hint: Any
    default: Any
    option: Option

    @property
    def required(self) -> bool:
        return self.default is dataclasses.MISSING

    @property
    def flag(self) -> str:
        """The option's name on the command line."""
        return self.option.flag if self.option.flag is not None else f"--{self.name.replace('_', '-')}"

    @property
    def choices(self) -> tuple[str, ...]:
        """The words that a Literal type allows; () for other types."""
        kinds = (self.hint, *get_args(self.hint))
        return next((get_args(kind) for kind in kinds if get_origin(kind) is Literal), ())


@cache
def declared(kind: Any) -> dict[str, Declared]:
    """Return the fields of a settings class by name, in order."""
    hints = get_type_hints(kind, include_extras=True)
    return {field.name: _declared(field, hints[field.name]) for field in dataclasses.fields(kind)}


def _declared(field: Any, hint: Any) -> Declared:
    made = field.default_factory
    if dataclasses.is_dataclass(made):  # an instance would be checked, which imports pydantic
        default: Any = made
    else:
        default = field.default if made is dataclasses.MISSING else made()
    options = [extra for extra in getattr(hint, "__metadata__", ()) if isinstance(extra, Option)]
    if get_origin(hint) is Annotated:
        hint = get_args(hint)[0]
    return Declared(field.name, hint, default, options[0] if options else Option(""))


def settings_in(hint: Any) -> Any:
    """Return the settings class that a field of this type holds, or None."""
    return next((kind for kind in (hint, *get_args(hint)) if dataclasses.is_dataclass(kind)), None)


def expected(hint: Any, also: Any = None) -> str:
    """Return a type in words: "a whole number or text"."""
    words = dict.fromkeys(_expected(hint)) | dict.fromkeys(_expected(also) if also is not None else ())
    if "a number" in words or any(word.startswith("one of") for word in words):
        words.pop("a whole number", None)
    return " or ".join(words)


def _expected(hint: Any) -> Iterator[str]:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        for kind in arguments:
            yield from _expected(kind) if kind is not type(None) else ()
    elif origin is Literal:
        yield f"one of {', '.join(map(str, arguments))}"
    elif origin in (list, tuple, Sequence):
        yield "a list"
    elif origin is dict:
        yield f"a mapping of names to {'numbers' if arguments[1] is float else 'values'}"
    else:
        plain = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
        yield "a path or a list" if hint is Any else plain.get(hint, "a mapping of settings")
