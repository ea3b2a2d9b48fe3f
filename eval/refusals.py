"""What a model answers to requests that should be refused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from .generation import Options
from .heads.prompts import encoded, requests
from .refusal_counts import is_refusal
from .result_cache import Store
from .settings import EvalSettings
from .tasks.candidate import Candidate
from .writing.continuations import write

ANSWER = 48  # tokens
BATCH = 8


def asked(settings: EvalSettings) -> list[str]:
    """The requests that an evaluation asks; [] where it asks none. Raises MhconvertError for a file without any."""
    return requests(settings.requests_file) if settings.refusals else []


def probe(
    candidate: Candidate,
    texts: Sequence[str],
    store: Store,
    *,
    fresh: bool,
    on_rows: Callable[[str, int, int], None],
) -> list[bool]:
    """Whether one model refuses each of the requests, from the store where it was asked before.

    Raises MhconvertError where its template refuses one, or it reads fewer tokens than one and the answer.
    """
    opened, tokenizer = candidate.opened, candidate.opened.tokenizer()
    rows = encoded(tokenizer, list(texts), opened.vocab_size)
    opened.require_length(max(map(len, rows)) + ANSWER)
    key = candidate.key() | {"refusals": list(texts), "tokens": ANSWER}
    known = None if fresh else store.load(key)
    if known is None:
        if candidate.settings.backend == "vllm":
            candidate.release()  # its process holds the device's memory
        model = candidate.lm.model if candidate.lm is not None else candidate.load(candidate.dtype)
        known = {"answers": answers(model, tokenizer, rows, on_rows)}
        store.save(key, known)
    return [is_refusal(answer) for answer in known["answers"]]


def answers(
    model: Any, tokenizer: Any, rows: Sequence[Tensor], on_rows: Callable[[str, int, int], None]
) -> list[str]:
    """The model's greedy answers to prompts (T,), each of at most ANSWER tokens."""
    found: list[str] = []
    for start in range(0, len(rows), BATCH):
        texts = write(model, [row.tolist() for row in rows[start : start + BATCH]], Options(ANSWER))
        found += tokenizer.batch_decode([text["tokens"] for text in texts], skip_special_tokens=True)
        on_rows("refusals", len(found), len(rows))
    return found
