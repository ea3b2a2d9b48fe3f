"""What a user may choose about the conversion."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from mhconvert.errors import BudgetError


@dataclass(frozen=True)
class GQASettings:
    """kv_budget: share of the donor's KV heads that may be left, in (0, 1]."""

    kv_budget: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.kv_budget <= 1:
            raise BudgetError(
                f"kv_budget={self.kv_budget} is outside (0, 1]; it is a share of the donor's KV heads"
            )

    def at_budget(self, share: float) -> GQASettings:
        """The same choices at another budget."""
        return dataclasses.replace(self, kv_budget=share)


SETTINGS = GQASettings
