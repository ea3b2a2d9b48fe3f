"""What a model answers to requests that should be refused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from ..convert.open_model import OpenModel
from .generation import Options
from .heads.prompts import encoded, requests
from .refusal_counts import compared, is_refusal
from .result_cache import Store, digest
from .settings import EvalSettings
from .tasks.candidate import Candidate
from .writing.continuations import write

ANSWER = 48  # tokens
BATCH = 8


def asked(settings: EvalSettings) -> list[str]:
    """The requests that an evaluation asks; [] where it asks none. Raises MhconvertError for a file without any."""
    return requests(settings.requests_file) if settings.refusals else []


def table(
    settings: EvalSettings, requests: Sequence[str], refused: Sequence[Sequence[bool]]
) -> dict[str, Any] | None:
    """What `refusal_counts.compared` returns, with the requests' source (the file's name) and their digest."""
    file, found = settings.requests_file, compared(refused)
    return found and found | {"source": file.name if file else "own", "digest": digest(list(requests))}


def token_rows(opened: OpenModel, texts: Sequence[str]) -> list[Tensor]:
    """Token ids (T,) of each request.

    Raises MhconvertError where the model's template refuses one, or it reads fewer tokens than one and the answer.
    """
    rows = encoded(opened.tokenizer(), list(texts), opened.vocab_size)
    opened.require_length(max(map(len, rows), default=0) + ANSWER)
    return rows


def probe(
    candidate: Candidate,
    texts: Sequence[str],
    store: Store,
    *,
    fresh: bool,
    on_rows: Callable[[str, int, int], None],
) -> list[bool]:
    """Whether one model refuses each of the requests, from the store where it was asked before."""
    rows = token_rows(candidate.opened, texts)
    key = candidate.key() | {"refusals": list(texts), "tokens": ANSWER}
    known = None if fresh else store.load(key)
    if known is None:
        known = {
            "answers": answers(
                candidate.model(),
                candidate.opened.tokenizer(),
                rows,
                on_rows,
                candidate.prompts_together(BATCH),
            )
        }
        store.save(key, known)
    return [is_refusal(answer) for answer in known["answers"]]


def answers(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Tensor],
    on_rows: Callable[[str, int, int], None],
    together: int = BATCH,
) -> list[str]:
    """The model's greedy answers to prompts (T,), each of at most ANSWER tokens, `together` in a batch."""
    found: list[str] = []
    for start in range(0, len(rows), together):
        texts = write(model, [row.tolist() for row in rows[start : start + together]], Options(ANSWER))
        found += tokenizer.batch_decode([text["tokens"] for text in texts], skip_special_tokens=True)
        on_rows("refusals", len(found), len(rows))
    return found
