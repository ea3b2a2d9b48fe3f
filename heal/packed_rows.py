"""Packs documents into rows of tokens without padding; each document has its own positions, the order is seeded."""

from __future__ import annotations

import heapq
import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mhconvert.errors import HealError

from ..convert.calibration import documents
from ..convert.calibration.token_rows import CHARACTERS_A_TOKEN, require_embedded, start_of_text
from ..convert.recipe.heal_settings import HealSettings

PIECE_ROWS = 4  # longer documents are cut into pieces of this many rows, which are shuffled separately
SPARE = 1.5  # characters read from a dataset, as a multiple of the estimated need

Sample = Callable[[int], Tensor]  # number of rows -> (rows, length), token ids sampled from the teacher
Pieces = Iterator[list[int]]


@dataclass(frozen=True)
class Rows:
    """Packed rows.

    Attributes:
        ids: (N, L), int32.
        positions: (N, L), int32; 0 starts a text that does not attend to anything before it.
    """

    ids: Tensor
    positions: Tensor

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: Any) -> Rows:
        return Rows(self.ids[index], self.positions[index])

    def predicted(self) -> Tensor:
        """(N, L − 1), bool: the positions whose next token belongs to the same text."""
        return self.positions[:, 1:] != 0


@dataclass(frozen=True)
class HealText:
    """The text of a run.

    Attributes:
        order: indices into `train`, in the order of training.
        tokens: source -> tokens in its whole rows, as far as it was read.
        skipped: source -> records without text, with `skip_bad`.
    """

    train: Rows
    held_out: Rows
    order: Tensor
    tokens: dict[str, int]
    skipped: dict[str, int]

    def facts(self, rows: int) -> dict[str, Any]:
        """What a report says of the text when the first `rows` rows of `order` are trained on."""
        return {
            "predictions": int(self.train[self.order[:rows]].predicted().sum()),
            "held_out_tokens": self.held_out.ids.numel(),
            "text_tokens": self.tokens,
            "skipped_records": self.skipped,
        }


def prepare(
    settings: HealSettings, tokenizer: Any, vocab_size: int, length: int, rows: int, sample: Sample
) -> HealText:
    """The training rows and the held-out rows of all sources.

    Args:
        vocab_size: rows of the smaller embedding of student and teacher.
        length: tokens per row.
        rows: to train on, repetitions included.
        sample: for the source "self".

    Raises:
        HealError: a source is too short; the message says how much text it has.
        TextError: a text is missing or unreadable, a record has none and `skip_bad` is not set, or a token has no
            embedding.
    """
    shares = {name: share for name, share in settings.data.items() if share}
    held_out = _divide(settings.held_out, shares)
    wanted = _divide(rows, shares)
    train: list[Rows] = []
    evaluation: list[Rows] = []
    orders: list[list[int]] = []
    tokens, skipped, first = dict[str, int](), dict[str, int](), 0
    for number, source in enumerate(shares):
        if not wanted[source] + held_out[source]:
            continue  # its share is less than a row
        distinct_rows = -(-wanted[source] // settings.epochs)
        seed = f"{settings.seed} {number}"
        if source == "self":
            ids = sample(held_out[source] + distinct_rows).int()
            positions = torch.arange(length, dtype=torch.int32).expand(ids.shape)
            both = Rows(ids, positions.clone())
            evaluation_rows, train_rows = both[: held_out[source]], both[held_out[source] :]
        else:
            characters = int((wanted[source] + held_out[source]) * length * CHARACTERS_A_TOKEN * SPARE)
            bad: list[str] | None = [] if settings.skip_bad else None
            pieces = _pieces(source, tokenizer, length, random.Random(seed), characters, bad)
            evaluation_rows = pack(pieces, length, held_out[source])
            train_rows = pack(pieces, length, wanted[source])
            skipped |= {source: len(bad)} if bad else {}
            require_embedded(torch.cat((evaluation_rows.ids, train_rows.ids)), tokenizer, vocab_size)
        if len(evaluation_rows) < held_out[source] or len(train_rows) * settings.epochs < wanted[source]:
            _raise_too_short(source, len(train_rows) * length, wanted[source] * length, settings, skipped)
        train.append(train_rows)
        evaluation.append(evaluation_rows)
        orders.append([first + index for index in _epochs(len(train_rows), wanted[source], seed)])
        tokens[source] = len(train_rows) * length
        first += len(train_rows)
    order = torch.tensor(_interleave(orders))
    return HealText(_concatenate(train), _concatenate(evaluation), order, tokens, skipped)


def pack(pieces: Pieces, length: int, rows: int) -> Rows:
    """The first `rows` rows of the pieces, or fewer if they end; the rest of the last piece is dropped."""
    ids: list[int] = []
    positions: list[int] = []
    while len(ids) < rows * length:
        piece = next(pieces, None)
        if piece is None:
            break
        ids += piece
        positions += range(len(piece))
    count = min(rows, len(ids) // length)
    id_rows = torch.tensor(ids[: count * length], dtype=torch.int32).view(count, length)
    raw = torch.tensor(positions[: count * length], dtype=torch.int32).view(count, length)
    # The positions of a text that continues from the previous row start at 0 again.
    continues = (raw == torch.arange(length, dtype=torch.int32) + raw[:, :1]).int().cumprod(1).bool()
    return Rows(id_rows, torch.where(continues, raw - raw[:, :1], raw))


def _pieces(
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


def _divide(count: int, shares: dict[str, float]) -> dict[str, int]:
    """`count` divided into whole parts in proportion to `shares`, by largest remainders."""
    whole = sum(shares.values())
    exact = {name: count * share / whole for name, share in shares.items()}
    parts = {name: int(part) for name, part in exact.items()}
    for name in sorted(shares, key=lambda name: parts[name] - exact[name])[: count - sum(parts.values())]:
        parts[name] += 1
    return parts


def _epochs(count: int, wanted: int, seed: str) -> list[int]:
    """`wanted` indices below `count`: shuffled epochs, each with every index once."""
    chance = random.Random(seed)
    indices: list[int] = []
    while len(indices) < wanted:
        epoch = list(range(count))
        chance.shuffle(epoch)
        indices += epoch
    return indices[:wanted]


def _interleave(orders: list[list[int]]) -> list[int]:
    """All entries in one list, those of each order evenly spread over it."""
    spread = ([((place + 0.5) / len(order), row) for place, row in enumerate(order)] for order in orders)
    return [row for _, row in heapq.merge(*spread, key=lambda entry: entry[0])]


def _concatenate(parts: list[Rows]) -> Rows:
    return Rows(torch.cat([part.ids for part in parts]), torch.cat([part.positions for part in parts]))


def _raise_too_short(
    source: str, available: int, wanted: int, settings: HealSettings, skipped: dict[str, int]
) -> None:
    """Raises HealError for a source with too few tokens."""
    epochs = -(-wanted // available) if available else 0
    advice = (
        f", or read it {epochs} times with --epochs {epochs}"
        if available and epochs > settings.epochs
        else ""
    )
    without = f", without {skipped[source]:,} records that were skipped," if source in skipped else ""
    raise HealError(
        f"{source}{without} has {available:,} tokens to train on (in whole rows, the held-out ones apart) and "
        f"{wanted:,} are asked for: add text, ask for fewer tokens{advice}"
    )


def check(settings: HealSettings) -> None:
    """Check that the sources exist, without reading their text.

    Raises:
        TextError: a file is missing.
        HealError: a file is in two sources.
    """
    sources = [name for name in settings.data if name != "self"]
    documents.check_sources(tuple(sources))
    places = Counter(path.resolve() for name in sources for path in documents.files(name))
    for path, times in places.items():
        if times > 1:
            raise HealError(
                f"{path} is in {times} sources; name it once, so that its held-out rows are not trained on"
            )
