"""WikiText's raw text as the documents that lm-eval's `wikitext` task scores: one article each."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mhconvert.errors import TextError

TITLE = re.compile(r" = [^=].* = \s*")  # a heading of the first level; deeper ones are ` = = `


def articles(text: str) -> list[str]:
    """The articles of a raw WikiText file, line breaks kept; what stands before the first title joins it."""
    found: list[list[str]] = [[]]
    for line in text.split("\n"):
        if TITLE.fullmatch(line) and any(part.strip() for part in found[-1]):
            found.append([])
        found[-1].append(line)
    return ["\n".join(lines) for lines in found]


def documents(*, path: str, split: str, **_: Any) -> dict[str, Any]:
    """{split: a dataset of `page`} for an lm-eval task's `custom_dataset`; lm-eval adds the task's metadata."""
    from datasets import Dataset

    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TextError(f"{path} of task wikitext cannot be read as UTF-8 text: {error}") from error
    if not text.strip():
        raise TextError(f"{path} of task wikitext is empty")
    pages = articles(text)
    return {split: Dataset.from_dict({"page": pages})}
