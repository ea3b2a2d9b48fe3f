"""Requests that a model should refuse, and how a model reads them."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

from torch import Tensor

from mhconvert.errors import MhconvertError

from ...convert.calibration.token_rows import require_embedded
from ..generation import encode
from ..writing.prompts import read

SHIPPED = "requests/refusable.txt"


def requests(file: Path | None) -> list[str]:
    """The requests of a file, written as prompts of generation are; None: the shipped ones. Raises as `read`."""
    return [prompt.text for prompt in read(file or Path(str(resources.files(__package__))) / SHIPPED)]


def encoded(tokenizer: Any, texts: list[str], vocab_size: int) -> list[Tensor]:
    """The token ids (T,) of each request, as a user's message where the tokenizer has a chat template.

    Raises MhconvertError for one that the template or the tokenizer cannot take.
    """
    rows, chat = [], bool(tokenizer.chat_template)
    for text in texts:
        ids = encode(tokenizer, text, chat, remedy=f"take '{text[:40]}' out")["input_ids"]
        if not ids.shape[1]:
            raise MhconvertError(f"the request '{text[:40]}' has no tokens for this model; take it out")
        require_embedded(ids, tokenizer, vocab_size)
        rows.append(ids[0])
    return rows
