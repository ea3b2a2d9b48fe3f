"""Makes command-line options from the declarations of settings classes, and settings from the options' values."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args, get_type_hints

import typer

from mhconvert.errors import MhconvertError

from ...convert.methods.registry import ADAPTERS, CACHE_METHODS
from ...convert.validation.option import Declared, declared, settings_in
from ...convert.validation.refusal import RefusedError

Values = Mapping[str, Any]  # what the command line says, by parameter; None: not said


@dataclass(frozen=True)
class Group:
    """The options of one settings class.

    Args:
        heading: What `--help` writes above them.
        kind: The settings class.
        only: Its fields that become options; None: all that have a flag.
        method: The method that alone has them; None: they do not depend on the method.
        layers: They concern methods that rewrite layers; a new adapter does not have them.
        cache: They concern methods that make the KV cache smaller.
    """

    heading: str
    kind: Any
    only: Collection[str] | None = None
    method: str | None = None
    layers: bool = False
    cache: bool = False

    def concerns(self, method: str) -> bool:
        """Whether a conversion by `method` has these options."""
        if self.cache and method not in CACHE_METHODS:
            return False
        return self.method in (None, method) and not (self.layers and method in ADAPTERS)

    @property
    def fields(self) -> list[Declared]:
        """The fields that are options."""
        return [
            field
            for field in declared(self.kind).values()
            if field.option.flag != ""
            and settings_in(field.hint) is None
            and (self.only is None or field.name in self.only)
        ]


def by_parameter(groups: Iterable[Group]) -> dict[str, list[tuple[Group, Declared]]]:
    """Return the fields of `groups` by the command's parameter, which several methods may share."""
    entries: dict[str, list[tuple[Group, Declared]]] = {}
    for group in groups:
        for field in group.fields:
            entries.setdefault(parameter_of(field), []).append((group, field))
    return entries


def settings_options(
    *groups: Group, of_a_pass: Collection[str] = ()
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Return a decorator that gives a command the options of `groups` in place of its `**options`.

    An option that several methods have becomes one parameter, whose help says what it does for each of them.
    of_a_pass: the command's own parameters that an adapter has no use for.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        hints = get_type_hints(command, include_extras=True)
        own = [
            parameter.replace(annotation=hints[name])
            for name, parameter in inspect.signature(command).parameters.items()
            if parameter.kind is not inspect.Parameter.VAR_KEYWORD
        ]
        made = [
            inspect.Parameter(
                name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=_annotation(entries)
            )
            for name, entries in by_parameter(groups).items()
        ]
        parameters = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own] + made
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {each.name: each.annotation for each in parameters} | {"return": None}
        command.__dict__.update(groups=groups, of_a_pass=of_a_pass)
        return command

    return decorate


def said(groups: Iterable[Group], options: Values) -> list[str]:
    """Return the flags of `groups` that were given on the command line."""
    flags = [
        _flags(field)[0] for group in groups for field in group.fields if said_of(field, options) is not None
    ]
    return list(dict.fromkeys(flags))


def said_of(field: Declared, options: Values) -> Any:
    """Return the value given for a field on the command line, or None."""
    return options.get(parameter_of(field))


def values_of(group: Group, options: Values) -> dict[str, Any]:
    """Return the given values of the group's fields by name, as its settings class takes them."""
    given = [(field, said_of(field, options)) for field in group.fields]
    return {
        field.name: not value if _negative(field) else value for field, value in given if value is not None
    }


def parameter_of(field: Declared) -> str:
    """The name of the command's parameter for a field."""
    return _flags(field)[0].removeprefix("--").replace("-", "_")


def _flags(field: Declared) -> list[str]:
    return field.flag.split("/")


def _negative(field: Declared) -> bool:
    """Whether the flag switches off what is done by default."""
    return field.default is True and field.flag.startswith("--no-")


def _annotation(entries: list[tuple[Group, Declared]]) -> Any:
    field = entries[0][1]
    kind, option = _kind(field), field.option
    check = option.parse if option.parse is not None and kind is str else None
    info = typer.Option(
        field.flag,
        metavar=option.unit or None,
        help=joint_help(entries),
        callback=readable(check) if check is not None else None,
    )
    return Annotated[kind | None, info]


def _kind(field: Declared) -> Any:
    """The type of the command's parameter; text where the settings class parses it."""
    words = field.option.words or field.choices
    if words:
        return Literal[words]
    if field.option.repeat:
        return list[str]
    kinds = {field.hint, *get_args(field.hint)}
    plain = next((kind for kind in (bool, int, float) if kind in kinds), str)
    return str if field.option.parse is not None else plain


def readable(parse: Callable[[Any], Any]) -> Callable[[str | None], str | None]:
    """Return a callback that refuses text which `parse` cannot read as an error of usage.

    What is read and refused is left to the settings, whose error is no error of usage.
    """

    def check(text: str | None) -> str | None:
        try:
            _ = text is None or parse(text)
        except RefusedError:
            return text
        except (MhconvertError, ArithmeticError, ValueError) as error:
            raise typer.BadParameter(str(error)) from error
        return text

    return check


def heading_of(entries: list[tuple[Group, Declared]]) -> str:
    """The heading of an option in `--help`: its group's, or the methods that share it."""
    methods = [group.method for group, _ in entries if group.method]
    return entries[0][0].heading if len(entries) == 1 else f"Options of {', '.join(methods)}"


def joint_help(entries: list[tuple[Group, Declared]]) -> str:
    """The help of an option; where methods differ, what it does for each."""
    texts: dict[str, list[str]] = {}
    for group, field in entries:
        texts.setdefault(help_text(field), []).append(group.method or "")
    if len(texts) == 1:
        return next(iter(texts))
    return " ".join(f"{', '.join(methods)}: {text}" for text, methods in texts.items())


def help_text(field: Declared) -> str:
    """The option's help with its default."""
    default = field.option.default or default_text(field.default)
    return (field.option.flag_help or field.option.help) + (f"  [default: {default}]" if default else "")


def default_text(default: Any) -> str:
    """A default as it is written on the command line; "" for a switch or None."""
    if default is None or default is False or default is True or default == ():
        return ""
    if isinstance(default, dict):
        return ",".join(name if share == 1 else f"{name}={share:g}" for name, share in default.items())
    return ",".join(map(str, default)) if isinstance(default, tuple) else str(default)
