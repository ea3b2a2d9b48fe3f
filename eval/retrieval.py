"""Needle-in-a-haystack retrieval: does a model recall a number hidden at several depths of texts of several lengths?

It shows damage to long-range attention that multiple-choice averages and perplexity hide.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from mhconvert.errors import MhconvertError

from .binomial import share_with_error
from .last_logits import last_logits
from .needle_text import Case, make_case
from .settings import RETRIEVAL_DEPTHS, RETRIEVAL_LENGTHS


def usable_lengths(limit: int | None, lengths: Sequence[int]) -> tuple[list[int], list[int]]:
    """(the lengths of at most `limit` tokens, the longer ones), in their order; None means no limit."""
    kept = [length for length in lengths if limit is None or length <= limit]
    return kept, [length for length in lengths if length not in kept]


def probe(
    model: Any,
    tokenizer: Any,
    *,
    lengths: Sequence[int] = RETRIEVAL_LENGTHS,
    depths: Sequence[float] = RETRIEVAL_DEPTHS,
    trials: int = 2,
    seed: int = 0,
    beyond: bool = False,
    on_cell: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """How many needles (hidden numbers) a causal language model recalls with greedy decoding.

    Args:
        model, tokenizer: of the language model.
        lengths: the most tokens of a case, question and answer included.
        depths: where the needle is, from 0 (first) to 1 (last).
        trials, seed: cases per length and depth; of the texts.
        beyond: let lengths exceed what the model's config says that it reads.
        on_cell: called with the cells done and the number of cells.

    Returns:
        recalled: (lengths, depths), the fraction of trials whose greedy continuation is the answer. nll: of the same
        shape, nats per token of the answer, which rise before recall fails. share: the mean of recalled; share_stderr:
        its standard error. absent: recalled and nll at the shortest length without a needle, the level of guessing.

    Raises MhconvertError: a length exceeds the model's limit without `beyond`, or is too short for the question.
    """
    _require_usable(None if beyond else model, lengths, depths, trials)
    cells: list[list[tuple[float, float]]] = [[] for _ in lengths]
    for done, (row, depth) in enumerate(itertools.product(range(len(lengths)), depths), 1):
        cells[row].append(_cell(model, tokenizer, lengths[row], depth, trials, seed))
        if on_cell is not None:
            on_cell(done, len(lengths) * len(depths))
    absent = _cell(model, tokenizer, min(lengths), 0.5, trials, seed, planted=False)
    recalled, nll = ([[cell[part] for cell in row] for row in cells] for part in (0, 1))
    number = len(lengths) * len(depths)
    share, share_stderr = share_with_error(round(trials * sum(map(sum, recalled))), number * trials)
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


def measure(model: Any, case: Case) -> tuple[bool, float]:
    """(whether the greedy continuation of the question is the answer, nats per token of the answer).

    One forward pass is enough: greedy decoding gives the answer exactly if each of its tokens is the most likely one
    after those before.
    """
    ids = torch.tensor([case.ids], device=model.device)
    logits = last_logits(model, ids[:, :-1], case.answer).float()
    answer = ids[0, -case.answer :]
    nll = -logits.log_softmax(-1).gather(1, answer[:, None]).cpu().double().mean().item()
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
    """Raises MhconvertError for a probe without cells, a depth outside the text, or a length beyond that of a model."""
    if not lengths or not depths or trials < 1:
        raise MhconvertError(
            f"{len(lengths)} lengths, {len(depths)} depths and {trials} trials make no probe; use at least 1 each"
        )
    if not all(0 <= depth <= 1 for depth in depths):
        raise MhconvertError(
            f"depths {', '.join(map(str, depths))} are not all between 0, first, and 1, last"
        )
    limit = (
        getattr(model.config.get_text_config(), "max_position_embeddings", None)
        if model is not None
        else None
    )
    _, beyond = usable_lengths(limit, lengths)
    if beyond:
        raise MhconvertError(
            f"the model reads at most {limit} tokens and a length of {max(beyond)} is asked for"
        )
