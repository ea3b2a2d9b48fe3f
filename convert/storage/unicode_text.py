"""Finds what Python's text may hold and no UTF-8 file or tokenizer can: halves of a character, lone surrogates."""

from __future__ import annotations


def lone_surrogate(text: str) -> str | None:
    """Words on the first lone surrogate in `text`, such as JSON's "\\ud800" gives; None where there is none."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = text[error.start].encode("unicode_escape").decode()
        return f"character {error.start + 1} is {half}, half of a character, which UTF-8 does not have"
    return None
