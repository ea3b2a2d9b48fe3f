"""Needle-in-a-haystack retrieval: does a model recall a number hidden at several depths of texts of several lengths?

It shows damage to long-range attention that multiple-choice averages and perplexity hide. The text is generated from
templates and a seed, so that the donor and its conversions read the same tokens and no data file is needed.
"""

from __future__ import annotations

import inspect
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mhconvert.errors import MhconvertError

from ..convert.calibration.token_rows import start_of_text

LENGTHS = (256, 512, 1024, 2048)
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)

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


def usable_lengths(limit: int | None, lengths: Sequence[int]) -> tuple[list[int], list[int]]:
    """(the lengths of at most `limit` tokens, the longer ones), in their order; None means no limit."""
    kept = [length for length in lengths if limit is None or length <= limit]
    return kept, [length for length in lengths if length not in kept]


def probe(
    model: Any,
    tokenizer: Any,
    *,
    lengths: Sequence[int] = LENGTHS,
    depths: Sequence[float] = DEPTHS,
    trials: int = 2,
    seed: int = 0,
    on_cell: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """How many needles (hidden numbers) a causal language model recalls with greedy decoding.

    Args:
        model, tokenizer: of the language model.
        lengths: the most tokens of a case, question and answer included.
        depths: where the needle is, from 0 (first) to 1 (last).
        trials: cases per length and depth.
        seed: of the texts.
        on_cell: called with the cells done and the number of cells.

    Returns:
        recalled: (lengths, depths), the fraction of trials whose greedy continuation is the answer. nll: of the same
        shape, nats per token of the answer, which rise before recall fails. share: the mean of recalled; share_stderr:
        its standard error. absent: recalled and nll at the shortest length without a needle, the level of guessing.

    Raises:
        MhconvertError: a length exceeds the model's limit, or is too short for needle and question.
    """
    _require_usable(model, lengths, depths, trials)
    cells: list[list[tuple[float, float]]] = []
    for row, length in enumerate(lengths):
        cells.append([])
        for column, depth in enumerate(depths):
            cells[-1].append(_cell(model, tokenizer, length, depth, trials, seed))
            if on_cell is not None:
                on_cell(row * len(depths) + column + 1, len(lengths) * len(depths))
    absent = _cell(model, tokenizer, min(lengths), 0.5, trials, seed, planted=False)
    recalled, nll = ([[cell[part] for cell in row] for row in cells] for part in (0, 1))
    number = len(lengths) * len(depths)
    share, share_stderr = _share(round(trials * sum(map(sum, recalled))), number * trials)
    return {
        "lengths": list(lengths),
        "depths": list(depths),
        "trials": trials,
        "recalled": recalled,
        "nll": nll,
        "share": share,
        "share_stderr": share_stderr,
        "mean_nll": sum(map(sum, nll)) / number,
        "cells": number,
        "absent": {"recalled": absent[0], "nll": absent[1]},
    }


def _share(hits: int, number: int) -> tuple[float, float]:
    """(hits ÷ number, its standard error).

    Source:
        Agresti and Coull (1998), Approximate is better than "exact" for interval estimation of binomial proportions:
        two hits and two misses are added, so that 0 of n and n of n are not certain.
    """
    centre = (hits + 2) / (number + 4)
    return hits / number, math.sqrt(centre * (1 - centre) / (number + 4))


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


def measure(model: Any, case: Case) -> tuple[bool, float]:
    """(whether the greedy continuation of the question is the answer, nats per token of the answer).

    One forward pass is enough: greedy decoding gives the answer exactly if each of its tokens is the most likely one
    after those before.
    """
    ids = torch.tensor([case.ids], device=model.device)
    inputs: dict[str, Any] = {"input_ids": ids[:, :-1], "use_cache": False}
    unwrapped = model.get_base_model() if hasattr(model, "get_base_model") else model
    if "logits_to_keep" in inspect.signature(unwrapped.forward).parameters:
        inputs["logits_to_keep"] = case.answer
    with torch.inference_mode():
        logits = model(**inputs).logits[0, -case.answer :].float()
    answer = ids[0, -case.answer :]
    nll = -logits.log_softmax(-1).gather(1, answer[:, None]).double().mean().item()
    return bool((logits.argmax(-1) == answer).all()), nll


def _cell(
    model: Any, tokenizer: Any, length: int, depth: float, trials: int, seed: int, planted: bool = True
) -> tuple[float, float]:
    """(the fraction of `trials` cases that are recalled, the mean of their nats per token of the answer)."""
    results = [
        measure(model, make_case(tokenizer, length, depth, seed=seed, trial=trial, planted=planted))
        for trial in range(trials)
    ]
    return sum(hit for hit, _ in results) / trials, sum(nll for _, nll in results) / trials


def _require_usable(model: Any, lengths: Sequence[int], depths: Sequence[float], trials: int) -> None:
    """Raises MhconvertError for a probe without cells, a depth outside the text, or a length beyond the model's."""
    if not lengths or not depths or trials < 1:
        raise MhconvertError(
            f"{len(lengths)} lengths, {len(depths)} depths and {trials} trials make no probe; use at least 1 each"
        )
    if not all(0 <= depth <= 1 for depth in depths):
        raise MhconvertError(
            f"depths {', '.join(map(str, depths))} are not all between 0, first, and 1, last"
        )
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    _, beyond = usable_lengths(limit, lengths)
    if beyond:
        raise MhconvertError(
            f"the model reads at most {limit} tokens and a length of {max(beyond)} is asked for"
        )


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
