"""The text of a healing run: rows of all its sources in their shares, in a seeded order."""

from __future__ import annotations

import heapq
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mhconvert.errors import HealError

from ..convert.calibration import documents
from ..convert.calibration.token_rows import CHARACTERS_A_TOKEN, require_embedded
from ..convert.recipe.heal_settings import HealSettings
from .first_words import first_words
from .packed_rows import Rows, pack, pieces_of

SPARE = 1.5  # characters read from a dataset, as a multiple of the estimated need

# (number of rows, prompts) -> (rows, length), token ids sampled from the teacher, half of the rows after a prompt
Sample = Callable[[int, list[list[int]]], Tensor]


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

    def facts(self) -> dict[str, Any]:
        """What a report says of the text."""
        return {
            "held_out_tokens": self.held_out.ids.numel(),
            "text_tokens": self.tokens,
            "skipped_records": self.skipped,
        }


def prepare(
    settings: HealSettings,
    tokenizer: Any,
    vocab_size: int,
    length: int,
    rows: int,
    sample: Sample,
    alone: bool = False,
) -> HealText:
    """The training rows and the held-out rows of all sources.

    Args:
        vocab_size: rows of the smaller embedding of student and teacher.
        length, rows: tokens per row; rows to train on, repetitions included.
        sample, alone: for the source "self"; as of `pack`.

    Raises:
        HealError: a source is too short; the message says how much text it has.
        TextError: a text is missing or unreadable, a record has none and `skip_bad` is not set, or a token has no
            embedding.
    """
    shares = {name: share for name, share in settings.data.items() if share}
    held_out, wanted = _divide(settings.held_out, shares), _divide(rows, shares)
    train, evaluation, orders = list[Rows](), list[Rows](), list[list[int]]()
    tokens, skipped, first = dict[str, int](), dict[str, int](), 0
    # `self` comes last, as it begins with the first words of the others.
    for number, source in sorted(enumerate(shares), key=lambda numbered: numbered[1] == "self"):
        if not wanted[source] + held_out[source]:
            continue  # its share is less than a row
        seed = f"{settings.seed} {number}"
        if source == "self":
            prompts = [words for part in train for words in first_words(part, tokenizer)]
            ids = sample(held_out[source] - (-wanted[source] // settings.epochs), prompts).int()
            both = Rows(ids, torch.arange(length, dtype=torch.int32).expand(ids.shape).clone())
            evaluation_rows, train_rows = both[: held_out[source]], both[held_out[source] :]
        else:
            bad: list[str] | None = [] if settings.skip_bad else None
            counts = (held_out[source], wanted[source])
            evaluation_rows, train_rows = _packed(source, tokenizer, length, counts, seed, bad, alone)
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


def _packed(
    source: str,
    tokenizer: Any,
    length: int,
    counts: tuple[int, int],
    seed: str,
    bad: list[str] | None,
    alone: bool,
) -> tuple[Rows, Rows]:
    """Up to `counts` rows of a source of files, those of either use from texts that the other does not have."""
    characters = int(sum(counts) * length * CHARACTERS_A_TOKEN * SPARE)
    pieces = pieces_of(source, tokenizer, length, random.Random(seed), characters, bad)
    first, second = (pack(pieces, length, count, alone) for count in counts)
    return first, second


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
