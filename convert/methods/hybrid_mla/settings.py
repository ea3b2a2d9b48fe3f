"""What a user may choose about a hybrid of linear layers and coded latents."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from mhconvert.errors import BudgetError

from ...validation.option import Option, Takes, default
from ...validation.settings import Settings

Mixer = Literal["mamba2", "gated-deltanet"]
Bits = Literal["auto", "2", "3", "4", "5", "6", "7", "8"]


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
    plan: ClassVar[Any] = None  # coded latents without linear layers may have one, and protected heads
    protect: ClassVar[Any] = None
    coded: ClassVar[bool] = True

    kv_budget: Annotated[
        float,
        Option(
            "Share of the bytes of the donor's 16-bit cache that states and codes may have together when it holds as "
            "many tokens as --context says.",
            "SHARE",
            gt=0,
            le=1,
            range_hint="is outside (0, 1]; it is a share of the donor's cache at the context",
        ),
    ] = 0.25
    context: Annotated[
        int | None,
        Option(
            "Tokens in the cache for which the budget is counted: states weigh the same whatever the length.",
            "TOKENS",
            ge=1,
            range_hint="is not a number of tokens from 1",
            default="what the donor reads, at most 32768",
        ),
    ] = None
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
    kv_bits: Annotated[
        Takes[Bits, int],
        Option(
            "auto: each component of the latent of a layer that is not linear has the 0 to 8 bits that it is worth. 2 "
            "to 8: so many or none.",
            parse=str,
            also=int,
        ),
    ] = default("auto")

    def check(self) -> None:
        """Raise BudgetError for a list beside a share."""
        if self.linear_layers is not None:
            self._set("linear_layers", sorted(set(self.linear_layers)))
            if self.linear != type(self).linear:
                raise BudgetError("linear_layers decides every layer; leave out linear or linear_layers")

    def at_budget(self, share: float) -> HybridSettings:
        """The same choices at another budget."""
        return dataclasses.replace(self, kv_budget=share)


SETTINGS = HybridSettings
