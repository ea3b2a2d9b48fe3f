"""Packs documents into rows of tokens; each document has its own positions."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..convert.calibration import documents
from ..convert.calibration.token_rows import CHARACTERS_A_TOKEN, start_of_text

PIECE_ROWS = 4  # longer documents are cut into pieces of this many rows, which are shuffled separately

Pieces = Iterator[list[int]]


@dataclass(frozen=True)
class Rows:
    """Packed rows.

    Attributes:
        ids: (N, L), int32.
        positions: (N, L), int32; 0 starts a text that does not attend to anything before it, and is that of padding.
        by_student: (N,), bool: the rows that the student wrote; None for no row.
    """

    ids: Tensor
    positions: Tensor
    by_student: Tensor | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: Any) -> Rows:
        return Rows(self.ids[index], self.positions[index])

    def predicted(self) -> Tensor:
        """(N, L − 1), bool: the positions whose next token belongs to the same text."""
        return self.positions[:, 1:] != 0


def reads_rows_whole(config: Any) -> bool:
    """Whether layers of a model keep something of a row, its first tokens or a state, whatever texts it has."""
    text = config.get_text_config()
    return any(getattr(text, "kv_windows", None) or ()) or bool(getattr(text, "linear_layers", None))


def pack(pieces: Pieces, length: int, rows: int, alone: bool = False) -> Rows:
    """The first `rows` rows of the pieces, or fewer if they end; the rest of the last piece is dropped.

    alone: no row has two pieces; behind the end of one its last token is repeated, which nothing sees or predicts.
    """
    ids: list[int] = []
    positions: list[int] = []
    while len(ids) < rows * length:
        piece = next(pieces, None)
        if piece is None:
            break
        rest = -len(piece) % length if alone else 0
        ids += piece + piece[-1:] * rest
        positions += [*range(len(piece)), *[0] * rest]
    count = min(rows, len(ids) // length)
    id_rows = torch.tensor(ids[: count * length], dtype=torch.int32).view(count, length)
    raw = torch.tensor(positions[: count * length], dtype=torch.int32).view(count, length)
    # The positions of a text that continues from the previous row start at 0 again.
    continues = (raw == torch.arange(length, dtype=torch.int32) + raw[:, :1]).int().cumprod(1).bool()
    return Rows(id_rows, torch.where(continues, raw - raw[:, :1], raw))


def pieces_of(
    source: str, tokenizer: Any, length: int, chance: random.Random, characters: int, bad: list[str] | None
) -> Pieces:
    """The token ids of the pieces of a source, in random order, with start and end tokens.

    Args:
        characters: read at most about so many from a dataset.
        bad: takes why each record without text has none; None: it is an error.
    """
    chat = documents.chat_format(tokenizer)
    texts: list[tuple[str, bool]] = []  # (piece, whether it ends its document)
    on_bad = None if bad is None else bad.append
    for batch in documents.read(source, chat=chat, characters=characters, on_bad=on_bad):
        for document in batch:
            cut = list(_cut(document, PIECE_ROWS * length * CHARACTERS_A_TOKEN))
            texts += [(text, number + 1 == len(cut)) for number, text in enumerate(cut)]
    chance.shuffle(texts)
    prefix, end = start_of_text(tokenizer), tokenizer.eos_token_id
    for text, ends in texts:
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if ids:
            start = [] if ids[: len(prefix)] == prefix else prefix  # a chat template may add it
            closed = ids[-1] == end or (tokenizer.eos_token and text.rstrip().endswith(tokenizer.eos_token))
            yield start + ids + [end] * (ends and end is not None and not closed)


def _cut(text: str, most: int) -> Iterator[str]:
    """Split `text` into pieces of at most `most` characters, at a space if the second half has one."""
    while len(text) > most:
        end = text.rfind(" ", most // 2, most)
        end = most if end < 0 else end
        yield text[:end]
        text = text[end:]
    if text:
        yield text
