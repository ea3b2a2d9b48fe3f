"""The first words of texts, with which sampled text begins: the teacher's (`self`) and the student's own."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from ..convert.calibration.token_rows import start_of_text
from .packed_rows import Rows

WORDS = 16  # tokens of a beginning, in rows of at least four times as many


def first_words(rows: Rows, tokenizer: Any) -> list[list[int]]:
    """For each row the ids with which a text in it begins: of a conversation all up to the first answer.

    A text that begins inside the row is preferred to one that may continue there. A beginning is at most half a row.
    """
    mark, prefix = answer_mark(tokenizer), start_of_text(tokenizer)
    found = (_beginning(*row, mark) for row in zip(rows.ids.tolist(), rows.positions.tolist(), strict=True))
    return [words if words[: len(prefix)] == prefix else prefix + words for words in found]


def answer_mark(tokenizer: Any) -> list[int]:
    """The ids after which the chat template lets an answer begin; [] if there are none."""
    if not tokenizer.chat_template:
        return []
    question = [{"role": "user", "content": "?"}]
    try:
        asked, open_ended = (
            str(tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=answer))
            for answer in (False, True)
        )
    except Exception:  # a template is a program, which raises errors of many classes
        return []
    mark = open_ended.removeprefix(asked) if open_ended.startswith(asked) else ""
    ids: list[int] = tokenizer(mark, add_special_tokens=False)["input_ids"]
    return ids


def _beginning(ids: list[int], positions: list[int], mark: list[int]) -> list[int]:
    """The beginning of a text in one row; `first_words` says of which."""
    starts = [place for place, position in enumerate(positions) if position == 0]
    first, *others = [ids[begin:end] for begin, end in pairwise([*starts, len(ids)])]
    texts, few = [*others, first], min(WORDS, len(ids) // 4)
    if mark:
        for text in texts:
            ends = (end for end in range(len(mark), len(ids) // 2 + 1) if text[end - len(mark) : end] == mark)
            if end := next(ends, 0):
                return text[:end]
    return next((text for text in texts if len(text) > few), first)[:few]
