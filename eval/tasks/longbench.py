"""LongBench's documents as lm-eval's tasks read them."""

from __future__ import annotations

from typing import Any


def with_questions(documents: Any) -> Any:
    """The documents, a dataset, with the column `input`, as LongBench publishes it, under lm-eval's name `question`."""
    return documents.rename_column("input", "question")
