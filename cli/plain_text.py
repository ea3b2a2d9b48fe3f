"""Text from files and names as it is shown: characters that would steer a terminal are escaped."""

from __future__ import annotations

import re
from typing import Any

# Control characters but tab and line feed, marks of writing direction, line separators, lone surrogates.
STEERING = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def plain(text: str) -> str:
    """`text` with \\x1b for an escape character, and so on."""
    return STEERING.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def one_line(text: str) -> str:
    """The same in one line."""
    return plain(" ".join(text.split()))


def plain_values(value: Any) -> Any:
    """Lists and dicts with `plain` of every string in them."""
    if isinstance(value, str):
        return plain(value)
    if isinstance(value, dict):
        return {plain_values(key): plain_values(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(plain_values, value)) if type(value) in (list, tuple) else value
    return value
