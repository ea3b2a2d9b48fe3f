"""Packs text into rows of tokens: documents end to end, each with its own positions, in a seeded order."""

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
from ..convert.calibration.token_rows import CHARACTERS_A_TOKEN, start_of_text
from ..convert.recipe.heal_settings import HealSettings

PIECE_ROWS = 4  # a longer document is cut into pieces of so many rows, which are drawn apart
SPARE = 1.5  # characters read from a dataset, over those that are probably needed

Sample = Callable[[int], Tensor]  # rows -> (rows, length) token ids that the teacher writes
Pieces = Iterator[list[int]]


@dataclass(frozen=True)
class Rows:
    """Packed rows. ids, positions (N, L) int32: a position of 0 begins a text that sees nothing before it."""

    ids: Tensor
    positions: Tensor

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: Any) -> Rows:
        return Rows(self.ids[index], self.positions[index])

    def predicted(self) -> Tensor:
        """(N, L − 1) bool: positions whose next token belongs to the same text."""
        return self.positions[:, 1:] != 0


@dataclass(frozen=True)
class HealText:
    """The text of a run. order: indices into `train`, one for each row that is trained on, in turn."""

    train: Rows
    held_out: Rows
    order: Tensor
    tokens: dict[str, int]  # by source, that it has in whole rows; more where not all of it was looked at


def prepare(settings: HealSettings, tokenizer: Any, length: int, rows: int, sample: Sample) -> HealText:
    """`rows` rows of `length` tokens to train on, in order, and the held-out ones.

    sample: for the source "self". Raises HealError, which says how much text there is, where it is too short.
    """
    shares = {name: share for name, share in settings.data.items() if share}
    held = _divided(settings.held_out, shares)
    wanted = _divided(rows, shares)
    train: list[Rows] = []
    kept: list[Rows] = []
    orders: list[list[int]] = []
    tokens, first = {}, 0
    for number, source in enumerate(shares):
        if not wanted[source] + held[source]:
            continue  # a share of less than a row
        once = -(-wanted[source] // settings.epochs)
        seed = f"{settings.seed} {number}"
        if source == "self":
            ids = sample(held[source] + once).int()
            positions = torch.arange(length, dtype=torch.int32).expand(ids.shape)
            both = Rows(ids, positions.clone())
            mine, found = both[: held[source]], both[held[source] :]
        else:
            characters = int((wanted[source] + held[source]) * length * CHARACTERS_A_TOKEN * SPARE)
            pieces = _pieces(source, tokenizer, length, random.Random(seed), characters)
            mine, found = packed(pieces, length, held[source]), packed(pieces, length, wanted[source])
        most = len(found) * settings.epochs
        if len(mine) < held[source] or most < wanted[source]:
            _too_short(source, len(found) * length, wanted[source] * length, settings)
        train.append(found)
        kept.append(mine)
        orders.append([first + index for index in _repeated(len(found), wanted[source], seed)])
        tokens[source] = len(found) * length
        first += len(found)
    return HealText(_joined(train), _joined(kept), torch.tensor(_interleaved(orders)), tokens)


def packed(pieces: Pieces, length: int, rows: int) -> Rows:
    """Return the first `rows` rows, or fewer where the text ends; the rest of the last document is dropped."""
    ids: list[int] = []
    positions: list[int] = []
    while len(ids) < rows * length:
        piece = next(pieces, None)
        if piece is None:
            break
        ids += piece
        positions += range(len(piece))
    count = min(rows, len(ids) // length)
    found = torch.tensor(ids[: count * length], dtype=torch.int32).view(count, length)
    where = torch.tensor(positions[: count * length], dtype=torch.int32).view(count, length)
    # A text that runs on from the row before begins anew.
    continues = (where == torch.arange(length, dtype=torch.int32) + where[:, :1]).int().cumprod(1).bool()
    return Rows(found, torch.where(continues, where - where[:, :1], where))


def _pieces(source: str, tokenizer: Any, length: int, chance: random.Random, characters: int) -> Pieces:
    """Yield the token ids of every piece of the source's text, in random order."""
    template = getattr(tokenizer, "chat_template", None)

    def chat(messages: list[dict[str, Any]]) -> str:
        return str(tokenizer.apply_chat_template(messages, tokenize=False))

    texts: list[tuple[str, bool]] = []  # and whether its document ends with it
    for found in documents.read(source, chat=chat if template else None, characters=characters):
        for document in found:
            cut = list(_cut(document, PIECE_ROWS * length * CHARACTERS_A_TOKEN))
            texts += [(text, number + 1 == len(cut)) for number, text in enumerate(cut)]
    chance.shuffle(texts)
    prefix, end = start_of_text(tokenizer), tokenizer.eos_token_id
    for text, ends in texts:
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if ids:
            start = [] if ids[: len(prefix)] == prefix else prefix  # a chat's template may have it
            closed = ids[-1] == end or (tokenizer.eos_token and text.rstrip().endswith(tokenizer.eos_token))
            yield start + ids + [end] * (ends and end is not None and not closed)


def _cut(text: str, most: int) -> Iterator[str]:
    """Split `text` into pieces of at most `most` characters, at a space where the last half has one."""
    while len(text) > most:
        end = text.rfind(" ", most // 2, most)
        end = most if end < 0 else end
        yield text[:end]
        text = text[end:]
    if text:
        yield text


def _divided(count: int, shares: dict[str, float]) -> dict[str, int]:
    """Divide `count` into whole parts by `shares`; the largest remainders are rounded up."""
    whole = sum(shares.values())
    exact = {name: count * share / whole for name, share in shares.items()}
    parts = {name: int(part) for name, part in exact.items()}
    for name in sorted(shares, key=lambda name: parts[name] - exact[name])[: count - sum(parts.values())]:
        parts[name] += 1
    return parts


def _repeated(count: int, wanted: int, seed: str) -> list[int]:
    """Return `wanted` indices below `count`: each once before any repeats, every round in another order."""
    chance = random.Random(seed)
    found: list[int] = []
    while len(found) < wanted:
        turn = list(range(count))
        chance.shuffle(turn)
        found += turn
    return found[:wanted]


def _interleaved(orders: list[list[int]]) -> list[int]:
    """Return all entries, those of each list in their order and evenly spread over the whole."""
    spread = ([((place + 0.5) / len(order), row) for place, row in enumerate(order)] for order in orders)
    return [row for _, row in heapq.merge(*spread, key=lambda entry: entry[0])]


def _joined(parts: list[Rows]) -> Rows:
    return Rows(torch.cat([part.ids for part in parts]), torch.cat([part.positions for part in parts]))


def _too_short(source: str, found: int, wanted: int, settings: HealSettings) -> None:
    epochs = -(-wanted // found) if found else 0
    advice = (
        f", or read it {epochs} times with --epochs {epochs}" if found and epochs > settings.epochs else ""
    )
    raise HealError(
        f"{source} has {found:,} tokens to train on (in whole rows, the held-out ones apart) and {wanted:,} are asked "
        f"for: add text, ask for fewer tokens{advice}"
    )


def check(settings: HealSettings) -> None:
    """Raise TextError for missing files and HealError for a file named twice. Reads no text."""
    sources = [name for name in settings.data if name != "self"]
    documents.check_sources(tuple(sources))
    places = Counter(path.resolve() for name in sources for path in documents.files(name))
    for path, times in places.items():
        if times > 1:
            raise HealError(
                f"{path} is in {times} sources; name it once, so that its held-out rows are not trained on"
            )
