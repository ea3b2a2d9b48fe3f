"""Requests that a model should refuse, and how a model reads them."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

from torch import Tensor

from mhconvert.errors import MhconvertError

from ...convert.calibration.token_rows import require_embedded
from ...convert.storage.regular_file import require_regular
from ..generation import encode

SHIPPED = "requests/refusable.txt"


def requests(file: Path | None) -> list[str]:
    """The requests of a file, one a line; None: the shipped ones. Raises MhconvertError for a file without any."""
    if file is None:
        text = (resources.files(__package__) / SHIPPED).read_text(encoding="utf-8")
    else:
        require_regular(file, MhconvertError)
        try:
            text = file.read_text(encoding="utf-8")
        except OSError as error:
            raise MhconvertError(f"{file} cannot be read: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise MhconvertError(f"{file} is no UTF-8 text; give a file with one request a line") from error
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines or any("\0" in line for line in lines):
        raise MhconvertError(f"{file} has no text; give a file with one request a line")
    return lines


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
