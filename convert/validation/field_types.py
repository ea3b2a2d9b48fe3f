"""Checks of fields that come from other libraries' dataclasses, and which fields differ from their defaults."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

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
