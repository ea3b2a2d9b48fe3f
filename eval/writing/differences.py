"""Means over prompts, and how far two sets of texts lie apart, with an error bar."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

Values = Sequence[float | None]  # a figure of each prompt's text


def mean(values: Values) -> float | None:
    """The mean of the values that are known; None where there are none."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def error(values: Values) -> float | None:
    """The standard error of `mean`, over prompts; None for fewer than two, or where it is not finite."""
    known = [value for value in values if value is not None]
    if len(known) < 2 or not all(map(math.isfinite, known)):
        return None
    return statistics.stdev(known) / math.sqrt(len(known))


def paired(ours: Values, theirs: Values) -> list[float]:
    """The differences ours − theirs of the prompts where both are known."""
    pairs = zip(ours, theirs, strict=True)
    return [a - b for a, b in pairs if a is not None and b is not None]


def paired_error(pairs: Sequence[float], yes_or_no: bool) -> float | None:
    """The standard error of the mean difference; None for fewer than two.

    Of figures that are 0 or 1 it counts a pair more of either sign, as Agresti and Coull (1998) do for shares, so that
    a few texts that all changed alike are not certain.
    """
    return error([*pairs, 1.0, -1.0] if yes_or_no and len(pairs) > 1 else pairs)


def beside(
    ours: Values, theirs: Values, spread: float, *, yes_or_no: bool = False, errors: float = 2.0
) -> dict[str, Any]:
    """value, difference, difference_stderr, within_noise: the mean of `ours` beside that of the donor's, paired.

    yes_or_no: whether the figure is 1 or 0 for each prompt.

    A difference is within noise that is no more than `errors` standard errors, or than `spread`, by which two sets of
    the donor's own texts differ; None where its error is not known.
    """
    pairs = paired(ours, theirs)
    difference, stderr = mean(pairs), paired_error(pairs, yes_or_no)
    noise = None
    if difference is not None and stderr is not None:
        noise = abs(difference) <= max(errors * stderr, spread)
    return {
        "value": mean(ours),
        "difference": difference,
        "difference_stderr": stderr,
        "within_noise": noise,
    }
