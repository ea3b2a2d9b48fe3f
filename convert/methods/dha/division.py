"""The heads of all layers by what a survey measured, and what equal numbers of K and V heads cost. No weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..budget_division import LayerNeed, divide, divide_in_levels, predicted
from .budget import HeadBudget


@dataclass(frozen=True)
class Price:
    """What a survey expects of an equal plan and of a free one within the same budget.

    Attributes:
        equal, free: sums of the layers' divergences by closed forms, nats per token.
        equal_heads, free_heads: K and V heads, all layers together.
    """

    equal: float
    free: float
    equal_heads: int
    free_heads: int

    def facts(self) -> dict[str, Any]:
        """As reports have it."""
        return {
            "predicted_kl": {"equal_heads": self.equal, "free": self.free},
            "heads": {"equal_heads": self.equal_heads, "free": self.free_heads},
        }

    def sentence(self) -> str:
        """For a user."""
        return (
            f"as many K as V heads in every layer: the survey predicts a KL of {self.equal:.3g} with "
            f"{self.equal_heads} heads, and {self.free:.3g} of a free plan with {self.free_heads} (before any fit)"
        )


def shared(needs: Sequence[LayerNeed], budget: HeadBudget) -> list[int]:
    """The heads of each layer, K and V together, that lose least within `budget`."""
    if budget.equal:
        return divide_in_levels(needs, budget.total, budget.levels, budget.whole)
    return divide(needs, budget.total, budget.floors, budget.most, budget.step, budget.whole)


def price(needs: Sequence[LayerNeed], heads: Sequence[int], free: HeadBudget) -> Price | None:
    """What `heads`, of an equal plan, cost against what `free` allows; None where the survey did not measure that."""
    if not all(need.free for need in needs):
        return None
    unconstrained = [need.unconstrained() for need in needs]
    best = shared(unconstrained, free)
    whole = free.whole
    return Price(predicted(needs, heads, whole), predicted(unconstrained, best, whole), sum(heads), sum(best))
