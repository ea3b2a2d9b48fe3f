"""What a user may choose about the conversion."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Annotated

from mhconvert.convert.validation.option import Option
from mhconvert.convert.validation.settings import Settings
from mhconvert.errors import BudgetError


@dataclass(frozen=True)
class GQASettings(Settings):
    """How many of the donor's KV heads are left."""

    fault = BudgetError

    kv_budget: Annotated[
        float, Option("Share of the donor's KV heads that may be left.", "SHARE", gt=0, le=1)
    ] = 0.5

    def at_budget(self, share: float) -> GQASettings:
        """The same choices at another budget."""
        return dataclasses.replace(self, kv_budget=share)


SETTINGS = GQASettings
