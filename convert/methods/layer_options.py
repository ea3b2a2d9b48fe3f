"""Options that methods with layers of several kinds share; each is declared once. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from mhconvert.errors import BudgetError

from ..validation.option import Option, Takes

Bits = Literal["auto", "2", "3", "4", "5", "6", "7", "8"]
TOKENS = "is not a number of tokens from 1"
RANGE = "is outside (0, 1]; it is a share of the donor's cache at the context"
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


ByteBudget = Annotated[
    float,
    Option(
        "Share of the bytes of the donor's 16-bit cache that may be left, states included, when it holds as many "
        "tokens as --context says.",
        "SHARE",
        gt=0,
        le=1,
        range_hint=RANGE,
    ),
]
Context = Annotated[
    int | None,
    Option(
        "Tokens in the cache for which the budget is counted: windows and states save nothing of a short text, and "
        "more of a longer one.",
        "TOKENS",
        ge=1,
        range_hint=TOKENS,
        default="what the donor reads, at most 32768",
    ),
]
Window = Annotated[
    int | None,
    Option(
        "Tokens, itself included, that a token of a windowed layer sees; where the first four are kept, beside them.",
        "TOKENS",
        ge=LEAST_WINDOW,
        range_hint=f"is not a number of tokens from {LEAST_WINDOW}",
        default="the donor's own, else 1024, at most an eighth of the context",
    ),
]
FullLayers = Annotated[
    Takes[list[int] | None, str | Sequence[int] | None],
    Option(
        "The layers that keep the whole text, such as 0,9,18; none: no layer. With swa they are instead of a budget.",
        "LIST",
        parse=layer_list,
        also=str,
        default="chosen by what a survey measures",
    ),
]
CodeBits = Annotated[
    Takes[Bits, int],
    Option(
        "auto: each component of the latent of a layer that caches tokens has the 0 to 8 bits that it is worth. 2 to "
        "8: so many or none.",
        parse=str,
        also=int,
    ),
]
KindPlan = Annotated[
    Any,
    Option(
        "The kind of every layer, and of coded latents the bits: a JSON file with layers such as {window: 1024}, "
        "{window: null, components_by_bits: {8: 4, 2: 90}} or {kind: linear}, as mhconvert.json, report.json and "
        "`--dry-run --survey --json` have them.",
        "FILE",
    ),
]
