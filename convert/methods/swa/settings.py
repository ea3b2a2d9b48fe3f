"""What a user may choose about windowed layers."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from mhconvert.errors import BudgetError

from ...validation.option import Option, Takes, default
from ...validation.settings import Settings

Sinks = Literal["learnt", "first", "none"]
RANGE = "is outside (0, 1]; it is a share of the donor's cache at the context"
TOKENS = "is not a number of tokens from 1"
# transformers' cache of a layer keeps the last `window - 1` tokens as [1 - window:], which of a window of 1 is all.
LEAST_WINDOW = 2


def layer_list(text: str) -> list[int]:
    """[0, 3] from "0,3", [] from "none". Raises BudgetError for other text."""
    try:
        return [] if text.strip() == "none" else [int(word) for word in text.split(",")]
    except ValueError:
        raise BudgetError(f"'{text}' is no list of layers such as 0,3,7, and not 'none'") from None


def require_shorter(window: int | None, context: int | None) -> None:
    """Raise BudgetError for a window that a context does not exceed, where both are given."""
    if window is not None and context is not None and window >= context:
        raise BudgetError(
            f"window={window} is not shorter than context={context}: no layer would drop a token"
        )


@dataclass(frozen=True)
class SWASettings(Settings):
    """How wide the window is, and how many layers keep the whole text."""

    fault = BudgetError
    instead_of_budget: ClassVar[dict[str, str]] = {"full_layers": "the full layers by --full-layers"}

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
    context: Annotated[
        int | None,
        Option(
            "Tokens in the cache for which the budget is counted: a window saves nothing of a shorter text, and more "
            "of a longer one.",
            "TOKENS",
            ge=1,
            range_hint=TOKENS,
            default="what the donor reads, at most 32768",
        ),
    ] = None
    window: Annotated[
        int | None,
        Option(
            "Tokens, itself included, that a token of a windowed layer sees; with sinks first, beside the first four.",
            "TOKENS",
            ge=LEAST_WINDOW,
            range_hint=f"is not a number of tokens from {LEAST_WINDOW}",
            default="the donor's own, else 1024, at most an eighth of the context",
        ),
    ] = None
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
    full_layers: Annotated[
        Takes[list[int] | None, str | Sequence[int] | None],
        Option(
            "The layers that keep the whole text, instead of a budget, such as 0,9,18; none: no layer.",
            "LIST",
            parse=layer_list,
            also=str,
            default="those whose windowing a survey measures to cost most",
        ),
    ] = default(None)

    def check(self) -> None:
        """Raise BudgetError for a window that the context does not exceed, and for a list beside a budget."""
        require_shorter(self.window, self.context)
        if self.full_layers is not None:
            self._set("full_layers", sorted(set(self.full_layers)))
            if self.kv_budget != type(self).kv_budget:
                raise BudgetError("full_layers decides every layer; leave out kv_budget or full_layers")

    def at_budget(self, share: float) -> SWASettings:
        """The same choices at another budget. Raises BudgetError where a list has fixed it."""
        if self.full_layers is not None:
            raise BudgetError("full_layers fixes the KV budget; leave it out to vary it")
        return dataclasses.replace(self, kv_budget=share)


SETTINGS = SWASettings
