"""Figures of one text: repetition, its end, its length, its format. Nothing here knows a model, and no code is run."""

from __future__ import annotations

import ast
import json
import re
import warnings
from collections.abc import Callable, Sequence

from ...convert.calibration.loops import longest_loop, loops

DISTINCT = (2, 4)  # n of distinct-n
YES_OR_NO = ("loops", "ends", "format")  # figures that are 1 or 0 for a text
FENCE = re.compile(r"```[^\n]*\n(.*?)(?:```|\Z)", re.DOTALL)


def figures(tokens: Sequence[int], ended: bool, text: str, form: str | None) -> dict[str, float | None]:
    """The figures of a text by name; None for one that the text does not have.

    Args:
        tokens: with the end token, if it ended by itself.
        ended: whether it did.
        text: what the tokens say.
        form: of FORMATS, in which it was asked for; None: free.
    """
    content = tokens[: len(tokens) - ended]
    return {
        **{f"distinct_{n}": distinct(content, n) for n in DISTINCT},
        "longest_loop": float(longest_loop(content)),
        "loops": float(loops(content)),
        "ends": float(ended),
        "tokens": float(len(content)),
        "format": float(FORMATS[form](text)) if form is not None else None,
    }


def distinct(tokens: Sequence[int], n: int) -> float | None:
    """Different n-grams ÷ n-grams; None for fewer than n tokens. Source: arXiv 1510.03055, section 5."""
    grams = [tuple(tokens[start : start + n]) for start in range(len(tokens) - n + 1)]
    return len(set(grams)) / len(grams) if grams else None


def first_difference(ours: Sequence[int] | str, theirs: Sequence[int] | str) -> int | None:
    """The position of the first token or character that differs, or that one of both lacks; None for equal texts."""
    pairs = zip(ours, theirs, strict=False)
    shared = next((at for at, pair in enumerate(pairs) if pair[0] != pair[1]), min(len(ours), len(theirs)))
    return None if shared == len(ours) == len(theirs) else shared


def is_json(text: str) -> bool:
    """Whether the text, or its first fenced block, is one JSON object or list."""
    try:
        return isinstance(json.loads(_block(text)), (dict, list))
    except (ValueError, RecursionError):
        return False


def is_python(text: str) -> bool:
    """Whether the text, or its first fenced block, is Python with a function or class. It is parsed, never run."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a string's backslashes
            body = ast.parse(_block(text)).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return any(isinstance(each, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) for each in body)


FORMATS: dict[str, Callable[[str], bool]] = {"json": is_json, "python": is_python}


def _block(text: str) -> str:
    """The first fenced block, which may lack its end; the whole text where there is none."""
    found = FENCE.search(text)
    return (found.group(1) if found else text).strip()
