"""Documents of lm-eval's `wikitext` task from WikiText's raw text: one article each."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mhconvert.errors import TextError

TITLE = re.compile(r" = [^=].* = \s*")  # a heading of the first level; deeper ones are ` = = `


def articles(text: str) -> list[str]:
    """The articles of a raw WikiText file with their line breaks; text before the first title belongs to it."""
    pages: list[list[str]] = [[]]
    for line in text.split("\n"):
        if TITLE.fullmatch(line) and any(part.strip() for part in pages[-1]):
            pages.append([])
        pages[-1].append(line)
    return ["\n".join(lines) for lines in pages]


def documents(*, path: str, split: str, **_: Any) -> dict[str, Any]:
    """{split: dataset with a column `page`}, for the `custom_dataset` of an lm-eval task.

    Raises TextError when the file at `path` is empty or not UTF-8.
    """
    from datasets import Dataset

    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TextError(f"{path} of task wikitext cannot be read as UTF-8 text: {error}") from error
    if not text.strip():
        raise TextError(f"{path} of task wikitext is empty")
    return {split: Dataset.from_dict({"page": articles(text)})}
