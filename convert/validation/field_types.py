"""Checks of fields that come from other libraries' dataclasses, and which fields differ from their defaults."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable
from typing import Any, get_type_hints

from mhconvert.errors import AdapterError

SHOWN = 60  # characters of an expression in a message


def changed_fields(choices: Any) -> list[str]:
    """The fields of a dataclass instance whose value is not their default, in order."""
    found = []
    for field in dataclasses.fields(choices):
        made = field.default_factory
        default = field.default if made is dataclasses.MISSING else made()
        if getattr(choices, field.name) != default:
            found.append(field.name)
    return found


def require_types(choices: Any, names: Iterable[str], file: object) -> None:
    """Raises AdapterError naming `file` where a field among `names` is not of the type that its dataclass states."""
    from huggingface_hub.dataclasses import type_validator

    stated = get_type_hints(type(choices))
    for name in names:
        if name not in stated:
            continue
        try:
            type_validator(name, value := getattr(choices, name), stated[name])
        except TypeError as error:
            kind = str(stated[name]).removeprefix("typing.")
            raise AdapterError(f"{file}: {name}={str(value)[:SHOWN]!r} is not of type {kind}") from error


def is_number(value: Any) -> bool:
    """Whether `value` is a finite int or float, as a float too; a bool is not."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def require_expression(pattern: str, name: str) -> None:
    """Raises AdapterError where `pattern`, of the field `name`, is no regular expression."""
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise AdapterError(f"{name} '{pattern[:SHOWN]}' is no regular expression: {error}") from error
