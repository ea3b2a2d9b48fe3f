"""A tolerance: how far a conversion may be from its donor on held-out text. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from mhconvert.errors import BudgetError

from ..validation.refusal import RefusedError

MEASURES = {"kl": 0.0, "ppl": 1.0}  # what the donor itself has
EXAMPLES = {"kl": "kl=0.05", "ppl": "ppl=1.05"}


class UnreachableError(BudgetError, RefusedError):
    """A tolerance that no conversion meets."""


@dataclass(frozen=True)
class Tolerance:
    """measure "kl": KL(donor ‖ converted), nats a token; "ppl": perplexity as a multiple of the donor's."""

    measure: str
    limit: float

    @property
    def allowed(self) -> float:
        """The largest difference from the donor's own value that is allowed."""
        return self.limit - MEASURES[self.measure]

    def value(self, found: dict[str, Any]) -> float:
        """Return the measured value in a conversion's report or a point of a curve."""
        perplexity = found["perplexity"]
        return float(found["kl"] if self.measure == "kl" else perplexity["converted"] / perplexity["donor"])

    def beyond(self, value: float) -> float:
        """Return the difference between a measured value and the donor's own; at most `allowed`."""
        return value - MEASURES[self.measure]

    def met(self, found: dict[str, Any]) -> bool:
        """Whether what was measured is within the tolerance."""
        return self.value(found) <= self.limit

    def __str__(self) -> str:
        return f"{self.measure}={self.limit!r}"


def parse(text: str) -> Tolerance:
    """`kl=0.05` or `ppl=1.05`.

    Raises BudgetError for anything else; UnreachableError, which is one, for what only the donor itself meets.
    """
    measure, equals, number = text.partition("=")
    if measure not in MEASURES or not equals:
        raise BudgetError(f"tolerance '{text}' is neither kl=NATS nor ppl=RATIO, such as kl=0.05 or ppl=1.05")
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


def checked(text: str) -> str:
    """Return the tolerance as it is written, so that a recipe keeps its hash. Raises BudgetError as `parse`."""
    parse(text)
    return text
