"""What a conversion loses on the held-out rows of each source of calibration text, and whether one loses much more."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ..calibration.text_files import told_apart

# A source loses much more: so many times what the others lose, by so many standard errors. The errors of few rows are
# rough, and every source is tested.
MUCH, STDERRS = 1.5, 3
LEAST_KL = 0.01  # nats a token, below which nothing is much


def by_source(parts: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """For each source: source, tokens (predictions), kl and perplexity_ratio, each with its _stderr, and `much`:
    whether its KL is more than MUCH times that of all others together, and more than noise. [] for one source.

    parts: of each source, an accumulator of predictions (`eval.fidelity.Fidelity`) for every row. A row is one passage,
        whose predictions are alike, so that noise is the spread of rows; of one row nothing is much.
    """
    if len(parts) < 2:
        return []
    found = []
    for source, own in parts.items():
        others = [part for name, theirs in parts.items() if name != source for part in theirs]
        (kl, error), (rest, rest_error) = (
            _mean([(p.divergence, p.tokens) for p in x]) for x in (own, others)
        )
        lost, lost_error = _mean([(p.converted_nll - p.donor_nll, p.tokens) for p in own])
        noise = STDERRS * math.hypot(
            *(math.inf if each is None else each for each in (error, rest_error and MUCH * rest_error))
        )
        ratio = math.exp(min(lost, 700.0))
        found.append(
            {
                "source": source,
                "tokens": sum(part.tokens for part in own),
                "kl": kl,
                "kl_stderr": error,
                "perplexity_ratio": ratio,
                "perplexity_ratio_stderr": lost_error and ratio * lost_error,
                "others_kl": rest,
                "much": kl > LEAST_KL and kl - MUCH * rest > noise,
            }
        )
    return found


def warnings(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """A sentence on each source of `by_source` that loses much more than the others."""
    return [
        f"on {name} the conversion loses much more than on its other sources: KL {one['kl']:.3g} ± "
        f"{one['kl_stderr']:.1g} nats a token, and {one['others_kl']:.3g} on the others, perplexity × "
        f"{one['perplexity_ratio']:.3f}; text of that kind needs more calibration, or a larger budget"
        for name, one in zip(told_apart([one["source"] for one in found]), found, strict=True)
        if one["much"]
    ]


def _mean(sums: Sequence[tuple[float, int]]) -> tuple[float, float | None]:
    """The mean over tokens of (sum, tokens) of rows, and its standard error, which one row does not tell."""
    tokens = sum(count for _, count in sums)
    mean = sum(total for total, _ in sums) / tokens
    if len(sums) < 2:
        return mean, None
    squares = sum((total - mean * count) ** 2 for total, count in sums)
    return mean, math.sqrt(squares * len(sums) / (len(sums) - 1)) / tokens
