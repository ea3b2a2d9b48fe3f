"""What a user may choose about coded latents with windows."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

from mhconvert.errors import BudgetError

from ...validation.option import default
from ...validation.settings import Settings
from ..kind_plan import read_coded_windows
from ..layer_options import ByteBudget, CodeBits, Context, FullLayers, KindPlan, Window, require_shorter


@dataclass(frozen=True)
class MLASWASettings(Settings):
    """One budget in bytes at one length of text, and what may be spent in it."""

    fault = BudgetError
    protect: ClassVar[Any] = None  # coded latents without windows may have protected heads
    coded: ClassVar[bool] = True

    kv_budget: ByteBudget = 0.0625
    context: Context = None
    window: Window = None
    full_layers: FullLayers = default(None)
    kv_bits: CodeBits = default("auto")
    plan: KindPlan = None

    def check(self) -> None:
        """Read the plan. Raise BudgetError for a window that is no shorter than the context, and a list with a plan."""
        if self.plan is not None:
            if self.full_layers is not None:
                raise BudgetError("a plan decides every layer; leave out full_layers or the plan")
            self._set("plan", read_coded_windows(self.plan))
        require_shorter(self.window, self.context)
        if self.full_layers is not None:
            self._set("full_layers", sorted(set(self.full_layers)))

    def at_budget(self, share: float) -> MLASWASettings:
        """The same choices at another budget. Raises BudgetError where a plan has fixed it."""
        if self.plan is not None:
            raise BudgetError("the plan fixes the KV budget; leave it out to vary it")
        return dataclasses.replace(self, kv_budget=share)


SETTINGS = MLASWASettings
