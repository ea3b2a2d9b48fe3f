"""What a model answers to requests that should be refused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .generation import Options, continue_rows
from .heads.prompts import encoded, requests
from .refusal_counts import is_refusal
from .result_cache import Store
from .settings import EvalSettings
from .tasks.candidate import Candidate

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
    ends = model.generation_config.eos_token_id
    padding = (ends if isinstance(ends, int) else ends[0]) if ends else 0
    found: list[str] = []
    for start in range(0, len(rows), BATCH):
        part = rows[start : start + BATCH]
        length = max(map(len, part))
        shifts = [(length - len(row), 0) for row in part]
        batch = {
            "input_ids": torch.stack(
                [_padded(row, shift, padding) for row, shift in zip(part, shifts, strict=True)]
            ),
            "attention_mask": torch.stack(
                [_padded(torch.ones_like(row), shift, 0) for row, shift in zip(part, shifts, strict=True)]
            ),
        }
        written = continue_rows(model, batch, Options(ANSWER), pad_token_id=padding).sequences[:, length:]
        found += tokenizer.batch_decode(written, skip_special_tokens=True)
        on_rows("refusals", len(found), len(rows))
    return found


def _padded(row: Tensor, shift: tuple[int, int], value: int) -> Tensor:
    return torch.nn.functional.pad(row, shift, value=value)
