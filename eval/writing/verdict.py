"""The verdict on how a converted model writes, in words, and the thresholds that decide it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

ODDS = 20  # to one, at which a text counts as told apart from the donor's
ERRORS = 3.0  # standard errors from which on a figure is another than the donor's
MORE_LOOPS = 0.15  # share of texts that loop, beyond the donor's

AS_DONOR, DRIFTS, LOOPS = "writes as its donor does", "drifts", "loops"
HOW = ("greedy", "sampled")
LESS_MORE = {  # a figure -> what is said where it is smaller, and where it is larger
    "nats": ("writes what the donor finds likelier", "writes what the donor finds less likely"),
    "distinct_4": ("repeats itself more", "repeats itself less"),
    "ends": ("ends by itself less often", "ends by itself more often"),
    "tokens": ("writes shorter texts", "writes longer texts"),
    "format": ("keeps the format less often", "keeps the format more often"),
}


def drift_tokens(kl: Sequence[Sequence[float]]) -> int | None:
    """Tokens after which half of the texts can be told from the donor's: the median over texts; None: never.

    A text is told apart at the token where the sum of its KL(writer ‖ donor), which is the expected logarithm of the
    odds for the writer, reaches ln(ODDS).
    """
    reached = sorted(_reached(costs) for costs in kl)
    median = statistics.median_low(reached) if reached else math.inf
    return int(median) if math.isfinite(median) else None


def _reached(costs: Sequence[float]) -> float:
    total = 0.0
    for at, cost in enumerate(costs, 1):
        total += cost
        if total >= math.log(ODDS):
            return at
    return math.inf


def verdict(model: Mapping[str, Any], template: str | None) -> dict[str, Any]:
    """verdict, of AS_DONOR, DRIFTS and LOOPS; words, the same without a subject; notes, what else differs.

    model: the figures of a converted model, with drift_tokens. template: how its prompts differ from the donor's.
    """
    notes = [template] if template else []
    notes += [words for name in LESS_MORE for words in _noted(model, name)]
    loops = [model[how]["loops"] for how in HOW]
    more = [found for found in loops if (_beyond(found) or 0.0) > MORE_LOOPS]
    tokens = model["drift_tokens"]
    drift = f"drifts after about {tokens} token{'s' * (tokens != 1)}" if tokens else ""
    if more:
        kind, words = LOOPS, f"loops in {100 * max(found['value'] for found in more):.3g} % of its texts"
        notes = [drift, *notes] if drift else notes
    elif drift:
        kind, words = DRIFTS, drift
    elif notes:
        kind, words = DRIFTS, "drifts in what its texts are like, not in their words"
    else:
        kind, words = AS_DONOR, AS_DONOR
    return {"verdict": kind, "words": words, "notes": notes}


def _noted(model: Mapping[str, Any], name: str) -> list[str]:
    """What is said of a figure, once, where it is another than the donor's."""
    found = (_beyond(model[how][name]) for how in HOW if name in model[how])
    return list(
        dict.fromkeys(LESS_MORE[name][difference > 0] for difference in found if difference is not None)
    )


def sentence(found: Mapping[str, Any]) -> str:
    """A verdict and its notes without a subject: "drifts after about 20 tokens, writes shorter texts"."""
    return ", ".join([found["words"], *found["notes"]])


def _beyond(found: Mapping[str, Any]) -> float | None:
    """The difference from the donor, where it is more than noise; None where its error is not known."""
    difference, stderr = found["difference"], found["difference_stderr"]
    if difference is None or stderr is None or found["within_noise"]:
        return None
    return difference if abs(difference) > ERRORS * stderr else None
