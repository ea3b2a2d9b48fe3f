"""What a user may choose about a MoH conversion."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from mhconvert.errors import BudgetError

from ...validation.option import Option, Takes, default
from ...validation.settings import Settings
from ..protected_heads import PROTECT, read_protected

Router = Literal["learned", "norm"]
Shared = Literal["calibrated", "first"]
Route = Literal["heads", "groups"]
Count = int | float


def head_counts(text: str) -> float | list[Count]:
    """0.75 from "0.75", 1.0 from "1", [7, 8, 0.5] from "7,8,0.5". Raises BudgetError for other text."""
    try:
        counts = [int(word) if word.strip().isdigit() else float(word) for word in text.split(",")]
    except ValueError:
        raise BudgetError(f"'{text}' is neither a share of heads nor a list such as 7,8,8,9") from None
    return counts if len(counts) > 1 else float(counts[0])


@dataclass(frozen=True)
class MoHSettings(Settings):
    """How many heads a token has, how they are chosen, and which of them every token has."""

    fault = BudgetError

    active: Annotated[
        Takes[Count | list[Count], str | Count | Sequence[Count]],
        Option(
            "Heads of a token: a share of a layer's heads, divided over the layers by what each needs, or a list with "
            "a number or share for each layer.",
            "SHARE|LIST",
            parse=head_counts,
            also=str,
        ),
    ] = default(0.75)
    shared: Annotated[
        Takes[Count | list[Count], str | Count | Sequence[Count]],
        Option(
            "Heads that every token has, of the active ones, as a share or a list. As many as active: fixed pruning.",
            "SHARE|LIST",
            parse=head_counts,
            also=str,
        ),
    ] = default(0.25)
    router: Annotated[
        Router,
        Option(
            "What chooses the other heads. learned: a linear map of the attention's input, fitted to what each head "
            "adds. norm: the size of the head's query, no parameters."
        ),
    ] = "learned"
    shared_heads: Annotated[
        Shared,
        Option(
            "Which heads are shared. calibrated: those that add most. first: the paper's rule, the first heads, layers "
            "alike and sizes of queries as they are."
        ),
    ] = "calibrated"
    route: Annotated[
        Route,
        Option(
            "What is routed. heads: single query heads. groups: those that read one KV head, whose keys and values "
            "are then not read."
        ),
    ] = "heads"
    uniform: Annotated[bool, Option("As many active heads in every layer.")] = False
    protect: Annotated[Any, PROTECT] = None

    def check(self) -> None:
        """Raise BudgetError for counts out of range, and for choices that exclude each other."""
        self._set("protect", read_protected(self.protect))
        if self.protect is not None and self.shared_heads == "first":
            raise BudgetError("shared_heads first shares the first heads; leave it out, or protect")
        for name in ("active", "shared"):
            value = getattr(self, name)
            if isinstance(value, (list, tuple)):
                self._set(name, list(value))
                for index, entry in enumerate(value):
                    _require_count(entry, f"{name}, layer {index}", least=int(name == "active"))
                if not value:
                    raise BudgetError(f"{name} is an empty list; it needs an entry a layer")
            elif not 0 <= value <= 1 or (name == "active" and not value):
                raise BudgetError(
                    f"{name}={value} is not a share of a layer's heads, from 0 to 1; numbers of heads are given for "
                    "each layer, as a list"
                )
        if isinstance(self.active, list) and self.uniform:
            raise BudgetError(
                "a list of active heads says what each layer has; leave out uniform or the list"
            )

    def at_budget(self, share: float) -> MoHSettings:
        """The same choices at another share of active heads. Raises BudgetError where a list has fixed them."""
        if isinstance(self.active, list):
            raise BudgetError("the list of active heads fixes them; leave it out to vary their share")
        return dataclasses.replace(self, active=share)


def _require_count(entry: Any, where: str, least: int) -> None:
    if entry < 0 or (least and not entry) or (not isinstance(entry, int) and not entry <= 1):
        raise BudgetError(f"{where}: {entry} is neither a number of heads nor a share of them in (0, 1]")


SETTINGS = MoHSettings
