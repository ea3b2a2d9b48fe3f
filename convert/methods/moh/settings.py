"""What a user may choose about a MoH conversion."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mhconvert.errors import BudgetError

from ...validation.field_types import is_number

Router = Literal["learned", "norm"]
Shared = Literal["calibrated", "first"]
Route = Literal["heads", "groups"]
CHOICES = {
    "router": ("learned", "norm"),
    "shared_heads": ("calibrated", "first"),
    "route": ("heads", "groups"),
}
Count = int | float


@dataclass(frozen=True)
class MoHSettings:
    """active, shared: heads of a token, and of them those that every token has; as a share of a layer's heads in (0, 1]
    and [0, 1], or a list with an entry a layer, a share or a whole number of heads. One share of active heads holds for
    all layers together, and is divided by what each of them needs.

    router: how the other heads are chosen: "learned" from the attention's input, by a linear map fitted to what each
    head adds; "norm": by the size of its query, no parameters. shared_heads: "calibrated": those that add most;
    "first": as the paper has it: the first ones, sizes of queries compared as they are, layers alike. route: single
    "heads", or "groups" of those that read one KV head: then keys and values that no chosen group reads are not read.
    uniform: whether every layer has as many active heads.
    """

    active: Count | Sequence[Count] = 0.75
    shared: Count | Sequence[Count] = 0.5
    router: Router = "learned"
    shared_heads: Shared = "calibrated"
    route: Route = "heads"
    uniform: bool = False

    def __post_init__(self) -> None:
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise BudgetError(f"{name} '{getattr(self, name)}' is not one of {', '.join(known)}")
        if not isinstance(self.uniform, bool):
            raise BudgetError(f"uniform={self.uniform!r} is neither true nor false")
        for name in ("active", "shared"):
            value = getattr(self, name)
            if isinstance(value, (list, tuple)):
                object.__setattr__(self, name, list(value))
                for index, entry in enumerate(value):
                    _require_count(entry, f"{name}, layer {index}", least=int(name == "active"))
                if not value:
                    raise BudgetError(f"{name} is an empty list; it needs an entry a layer")
            elif not is_number(value) or not 0 <= value <= 1 or (name == "active" and not value):
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
    whole = isinstance(entry, int) and not isinstance(entry, bool)
    if not is_number(entry) or entry < 0 or (least and not entry) or (not whole and entry > 1):
        raise BudgetError(f"{where}: {entry} is neither a number of heads nor a share of them in (0, 1]")


SETTINGS = MoHSettings
