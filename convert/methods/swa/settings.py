"""What a user may choose about windowed layers."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from mhconvert.errors import BudgetError

from ...validation.option import Option, default
from ...validation.settings import Settings
from ..kind_plan import read_windows
from ..layer_options import RANGE, Context, FullLayers, KindPlan, Window, require_shorter

Sinks = Literal["learnt", "first", "none"]


@dataclass(frozen=True)
class SWASettings(Settings):
    """How wide the window is, and how many layers keep the whole text."""

    fault = BudgetError
    instead_of_budget: ClassVar[dict[str, str]] = {
        "full_layers": "the full layers by --full-layers",
        "plan": "the windows by --plan",
    }

    kv_budget: Annotated[
        float,
        Option(
            "Share of the donor's cache that may be left when it holds as many tokens as --context says.",
            "SHARE",
            gt=0,
            le=1,
            range_hint=RANGE,
        ),
    ] = 0.5
    context: Context = None
    window: Window = None
    sinks: Annotated[
        Sinks | None,
        Option(
            "learnt: a logit for each head of a windowed layer takes the attention that the dropped tokens had, in "
            "the class granite_swa. first: the first four tokens of the text stay beside the window, with the donor's "
            "own weights; nearest to the donor, in a class of mhconvert that engines do not load. none: the donor's "
            "attention on fewer tokens, in a class that engines know better.",
            default="learnt where granite_swa holds the donor, else none, else first",
        ),
    ] = None
    full_layers: FullLayers = default(None)
    plan: KindPlan = None

    def check(self) -> None:
        """Read the plan. Raise BudgetError for a window not shorter than the context, and for two of a budget, a list
        and a plan."""
        if self.plan is not None:
            self._set("plan", read_windows(self.plan))
        require_shorter(self.window, self.context)
        if self.full_layers is not None:
            self._set("full_layers", sorted(set(self.full_layers)))
        for name in ("full_layers", "plan"):
            if getattr(self, name) is not None and self.kv_budget != type(self).kv_budget:
                raise BudgetError(f"{name} decides every layer; leave out kv_budget or {name}")
        if self.full_layers is not None and self.plan is not None:
            raise BudgetError("a plan decides every layer; leave out full_layers or the plan")

    def at_budget(self, share: float) -> SWASettings:
        """The same choices at another budget. Raises BudgetError where a list or a plan has fixed it."""
        for name in ("full_layers", "plan"):
            if getattr(self, name) is not None:
                raise BudgetError(f"{name} fixes the KV budget; leave it out to vary it")
        return dataclasses.replace(self, kv_budget=share)


SETTINGS = SWASettings
