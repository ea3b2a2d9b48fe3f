"""What a user may choose about a hybrid of linear layers and coded latents."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from mhconvert.errors import BudgetError

from ...validation.option import Option, Takes, default
from ...validation.settings import Settings
from ..kind_plan import read_linear
from ..layer_options import ByteBudget, CodeBits, Context, KindPlan

Mixer = Literal["mamba2", "gated-deltanet"]


def linear_list(text: str) -> list[int]:
    """[3, 7] from "3,7". Raises BudgetError for other text."""
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise BudgetError(f"'{text}' is no list of layers such as 3,7,11") from None


@dataclass(frozen=True)
class HybridSettings(Settings):
    """How many layers are linear, and one budget in bytes at one length of text for all."""

    fault = BudgetError
    protect: ClassVar[Any] = None  # coded latents without linear layers may have protected heads
    coded: ClassVar[bool] = True

    kv_budget: ByteBudget = 0.25
    context: Context = None
    linear: Annotated[
        float,
        Option(
            "Share of the layers that become linear, rounded to whole layers: those that a survey measures to cost "
            "least, never the first or the last.",
            "SHARE",
            gt=0,
            lt=1,
            range_hint="is outside (0, 1); it is a share of the layers",
        ),
    ] = 0.25
    linear_layers: Annotated[
        Takes[list[int] | None, str | Sequence[int] | None],
        Option(
            "The layers that become linear, such as 3,7,11, instead of a share of them.",
            "LIST",
            parse=linear_list,
            also=str,
            default="by --linear and a survey",
        ),
    ] = default(None)
    mixer: Annotated[
        Mixer,
        Option(
            "What a linear layer is: mamba2 decays its state, gated-deltanet also overwrites what a key held."
        ),
    ] = "mamba2"
    kv_bits: CodeBits = default("auto")
    plan: KindPlan = None

    def check(self) -> None:
        """Read the plan. Raise BudgetError for two of a share, a list and a plan."""
        if self.linear_layers is not None:
            self._set("linear_layers", sorted(set(self.linear_layers)))
            if self.linear != type(self).linear:
                raise BudgetError("linear_layers decides every layer; leave out linear or linear_layers")
        if self.plan is not None:
            for name in ("linear", "linear_layers"):
                if getattr(self, name) != getattr(type(self), name):
                    raise BudgetError(f"a plan decides every layer; leave out {name} or the plan")
            self._set("plan", read_linear(self.plan))

    def at_budget(self, share: float) -> HybridSettings:
        """The same choices at another budget. Raises BudgetError where a plan has fixed it."""
        if self.plan is not None:
            raise BudgetError("the plan fixes the KV budget; leave it out to vary it")
        return dataclasses.replace(self, kv_budget=share)


SETTINGS = HybridSettings
