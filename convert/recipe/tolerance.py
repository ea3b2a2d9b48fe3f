"""A tolerance: how far a conversion may be from its donor, on held-out text or on its own. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mhconvert.errors import BudgetError

from ..validation.option import Option
from ..validation.refusal import RefusedError

MEASURES = {"kl": 0.0, "ppl": 1.0, "generation": 0.0}  # what the donor itself has
OWN_PROMPTS = "own"  # what reports and records call the prompts that ship with mhconvert
PROMPTS = Option(
    "Of a tolerance on generation: what the result is asked, in a file as eval --generation reads it.",
    "FILE",
    default="forty of our own",
)
EXAMPLES = {"kl": "kl=0.05", "ppl": "ppl=1.05", "generation": "generation=0.2"}


class UnreachableError(BudgetError, RefusedError):
    """A tolerance that no conversion meets."""


@dataclass(frozen=True)
class Tolerance:
    """measure "kl": KL(donor ‖ converted) on held-out text, nats a token; "ppl": perplexity there, as a multiple of the
    donor's; "generation": KL(converted ‖ donor) on text that the converted model writes, nats a token."""

    measure: str
    limit: float

    @property
    def allowed(self) -> float:
        """The largest difference from the donor's own value that is allowed."""
        return self.limit - MEASURES[self.measure]

    @property
    def on_policy(self) -> bool:
        """Whether it is of text that only a whole converted model can write."""
        return self.measure == "generation"

    @property
    def held_out(self) -> Tolerance:
        """The tolerance on held-out text that says where to look: itself, or of one on the model's own text the KL."""
        return Tolerance("kl", self.limit) if self.on_policy else self

    def value(self, found: dict[str, Any]) -> float:
        """Return the measured value in a conversion's report or a point of a curve."""
        if self.on_policy:
            return float(found["on_policy"]["kl"])
        perplexity = found["perplexity"]
        return float(found["kl"] if self.measure == "kl" else perplexity["converted"] / perplexity["donor"])

    def measured(self, report: dict[str, Any]) -> dict[str, Any]:
        """measured: the value in a conversion's report; of text that the model wrote also stderr, over prompts, digest,
        of the prompts, and kl, that on held-out text."""
        if not self.on_policy:
            return {"measured": self.value(report)}
        return {
            "measured": self.value(report),
            "stderr": report["on_policy"]["kl_stderr"],
            "digest": report["on_policy"]["digest"],
            "kl": report["kl"],
        }

    def beyond(self, value: float) -> float:
        """Return the difference between a measured value and the donor's own; at most `allowed`."""
        return value - MEASURES[self.measure]

    def __str__(self) -> str:
        return f"{self.measure}={self.limit!r}"


def parse(text: str) -> Tolerance:
    """`kl=0.05`, `ppl=1.05` or `generation=0.2`.

    Raises BudgetError for anything else; UnreachableError, which is one, for what only the donor itself meets.
    """
    measure, equals, number = text.partition("=")
    if measure not in MEASURES or not equals:
        raise BudgetError(
            f"tolerance '{text}' is none of kl=NATS, ppl=RATIO and generation=NATS, such as "
            f"{', '.join(EXAMPLES.values())}"
        )
    try:
        limit = float(number)
    except ValueError:
        raise BudgetError(
            f"tolerance '{text}' has no number; write one such as {EXAMPLES[measure]}"
        ) from None
    if not MEASURES[measure] < limit < math.inf:
        raise UnreachableError(
            f"tolerance '{text}' is out of reach: {measure} must be a number above {MEASURES[measure]:g}, which is "
            "what the donor itself has"
        )
    return Tolerance(measure, limit)


def prompts_file(prompts: str | None) -> Path | None:
    """The file of a recipe's prompts, with ~ expanded; None for our own."""
    return Path(prompts).expanduser() if prompts else None


def on_policy(text: str | None) -> bool:
    """Whether a recipe's tolerance, where it has one, is on text that the converted model writes."""
    return text is not None and parse(text).on_policy


def checked(text: str) -> str:
    """Return the tolerance as it is written, so that a recipe keeps its hash. Raises BudgetError as `parse`."""
    parse(text)
    return text
