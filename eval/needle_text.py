"""Texts with a number hidden in them, and the question for it: generated from templates and a seed.

So the donor and its conversions read the same tokens, and no data file is needed.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mhconvert.errors import MhconvertError

from ..convert.calibration.token_rows import start_of_text

NAMES = (
    "Alma",
    "Bruno",
    "Clara",
    "Dario",
    "Elena",
    "Felix",
    "Greta",
    "Hugo",
    "Irene",
    "Jonas",
    "Katya",
    "Leon",
)
CITIES = ("Aarhus", "Bilbao", "Cork", "Dresden", "Exeter", "Florence", "Ghent", "Halifax", "Izmir", "Jaipur")
PEOPLE = ("the baker", "the old captain", "my neighbour", "the librarian", "a young painter", "the postman")
THINGS = ("a wooden chair", "the blue kettle", "a long letter", "two ripe pears", "an umbrella", "the map")
PLACES = ("by the harbour", "in the market", "near the old bridge", "at the station", "behind the church")
TIMES = (
    "in the morning",
    "after lunch",
    "on Sundays",
    "before the rain came",
    "late in autumn",
    "once a week",
)
SKIES = ("grey", "clear", "pale", "heavy with clouds", "warm and still", "full of swallows")
SENTENCES = (
    "{person} carried {thing} home and said nothing about it.",
    "{time}, {person} waited {place} and watched the boats.",
    "The sky was {sky}, and the streets {place} were quiet.",
    "{person} had left {thing} {place} again.",
    "{time}, somebody sang {place} until the lamps were lit.",
    "Nobody remembered who had paid for {thing}.",
    "{time}, the sky was {sky} and the bread was late.",
    "{person} told a story about {thing}, and everyone laughed.",
)
NEEDLE = "The secret number of {key} is {number}."
QUESTION = "The secret number of {key} is"


@dataclass(frozen=True)
class Case:
    """Token ids of a text, a question and its answer, which is the last `answer` tokens."""

    ids: tuple[int, ...]
    answer: int


def make_case(
    tokenizer: Any, length: int, depth: float, *, seed: int = 0, trial: int = 0, planted: bool = True
) -> Case:
    """Sentences with the needle at `depth`, the question and the answer: at most `length` tokens.

    The same arguments give the same case on every machine. It is shorter than `length` by less than two sentences.

    Args:
        tokenizer: of the model.
        length: in tokens.
        depth: from 0 (first) to 1 (last).
        seed, trial: choose the words.
        planted: whether the needle is in the text.

    Raises:
        MhconvertError: needle and question do not fit.
    """
    rng = random.Random(f"{seed} {length} {depth} {trial}")
    key = f"{rng.choice(NAMES)} from {rng.choice(CITIES)}"
    number = str(rng.randrange(10**6, 10**7))
    needle = [NEEDLE.format(key=key, number=number)] if planted else []
    question = QUESTION.format(key=key)
    filler: list[str] = []
    size = 0
    while size < length:
        filler.append(_sentence(rng))
        size += len(_encode(tokenizer, " " + filler[-1]))
    while True:
        before = round(depth * len(filler))
        text = " ".join([*filler[:before], *needle, *filler[before:], question])
        ids = start_of_text(tokenizer) + _encode(tokenizer, f"{text} {number}")
        if len(ids) <= length:
            return Case(
                tuple(ids),
                len(ids) - _shared_prefix(ids, start_of_text(tokenizer) + _encode(tokenizer, text)),
            )
        if not filler:
            raise MhconvertError(
                f"a length of {length} tokens does not hold needle and question, which take {len(ids)}; "
                "use longer lengths"
            )
        filler.pop()


def _sentence(rng: random.Random) -> str:
    """A sentence of the text that the needle is hidden in."""
    sentence = rng.choice(SENTENCES).format(
        person=rng.choice(PEOPLE),
        thing=rng.choice(THINGS),
        place=rng.choice(PLACES),
        time=rng.choice(TIMES),
        sky=rng.choice(SKIES),
    )
    return sentence[0].upper() + sentence[1:]


def _encode(tokenizer: Any, text: str) -> list[int]:
    """The token ids of `text` alone."""
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def _shared_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    """The length of the longest common prefix."""
    for index, (ours, theirs) in enumerate(zip(left, right, strict=False)):
        if ours != theirs:
            return index
    return min(len(left), len(right))
