"""What a user may choose about coded latents with windows."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from mhconvert.errors import BudgetError

from ...validation.option import Option, Takes, default
from ...validation.settings import Settings
from ..swa.settings import LEAST_WINDOW, RANGE, TOKENS, layer_list, require_shorter

Bits = Literal["auto", "2", "3", "4", "5", "6", "7", "8"]


@dataclass(frozen=True)
class MLASWASettings(Settings):
    """One budget in bytes at one length of text, and what may be spent in it."""

    fault = BudgetError
    plan: ClassVar[Any] = None  # coded latents without windows may have one, and protected heads
    protect: ClassVar[Any] = None
    coded: ClassVar[bool] = True

    kv_budget: Annotated[
        float,
        Option(
            "Share of the bytes of the donor's 16-bit cache that may be left when it holds as many tokens as --context "
            "says.",
            "SHARE",
            gt=0,
            le=1,
            range_hint=RANGE,
        ),
    ] = 0.0625
    context: Annotated[
        int | None,
        Option(
            "Tokens in the cache for which the budget is counted.",
            "TOKENS",
            ge=1,
            range_hint=TOKENS,
            default="what the donor reads, at most 32768",
        ),
    ] = None
    window: Annotated[
        int | None,
        Option(
            "Tokens, itself included, that a token of a windowed layer sees beside the first four.",
            "TOKENS",
            ge=LEAST_WINDOW,
            range_hint=f"is not a number of tokens from {LEAST_WINDOW}",
            default="the donor's own, else 1024, at most an eighth of the context",
        ),
    ] = None
    full_layers: Annotated[
        Takes[list[int] | None, str | Sequence[int] | None],
        Option(
            "The layers that keep the whole text, such as 0,9,18; none: no layer.",
            "LIST",
            parse=layer_list,
            also=str,
            default="chosen together with the bits, by what a survey measures of both",
        ),
    ] = default(None)
    kv_bits: Annotated[
        Takes[Bits, int],
        Option(
            "auto: each component of a layer's latent has the 0 to 8 bits that it is worth. 2 to 8: so many or none.",
            parse=str,
            also=int,
        ),
    ] = default("auto")

    def check(self) -> None:
        """Raise BudgetError for a window that the context does not exceed."""
        require_shorter(self.window, self.context)
        if self.full_layers is not None:
            self._set("full_layers", sorted(set(self.full_layers)))

    def at_budget(self, share: float) -> MLASWASettings:
        """The same choices at another budget."""
        return dataclasses.replace(self, kv_budget=share)


SETTINGS = MLASWASettings
