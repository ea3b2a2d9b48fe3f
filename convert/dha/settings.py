"""What a user may choose about a DHA conversion."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

from mhconvert.convert.errors import BudgetError

Fusion = Literal["closed", "trained"]


@dataclass(frozen=True)
class DHASettings:
    """kv_budget: share of the donor's K and V heads, all layers together, that may be left, in (0, 1].

    uniform: as many K as V heads in every layer, read by groups of one size: the donor's own architecture, with fewer
    KV heads. regroup: whether query heads that read one KV head in the donor may read different ones (None: what
    measures better). min_heads, max_heads: K heads, and V heads, of any layer; max None: the donor's.
    head_multiple: that these numbers are multiples of (of devices in tensor parallelism, say).
    plan: a JSON file with the heads of each layer, instead of a budget (`heads.read_plan`).
    fusion: "closed": heads are fused in closed form. "trained": they are only turned towards each other, and the result
    is the donor until `mhconvert heal --fusion` trains them to be one.
    """

    kv_budget: float = 0.5
    uniform: bool = False
    regroup: bool | None = None
    min_heads: int = 1
    max_heads: int | None = None
    head_multiple: int = 1
    plan: str | None = None
    fusion: Fusion = "closed"

    def __post_init__(self) -> None:
        if not 0 < self.kv_budget <= 1:
            raise BudgetError(
                f"kv_budget={self.kv_budget} is outside (0, 1]; it is a share of the donor's KV heads"
            )
        for name in ("min_heads", "max_heads", "head_multiple"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise BudgetError(f"{name}={value} is not a number of heads from 1")
        if self.max_heads is not None and self.max_heads < self.min_heads:
            raise BudgetError(f"max_heads={self.max_heads} is less than min_heads={self.min_heads}")
        if self.fusion not in ("closed", "trained"):
            raise BudgetError(f"fusion '{self.fusion}' is not one of closed, trained")
        if self.uniform and self.fusion == "trained":
            raise BudgetError("a uniform plan is fused in closed form; leave out uniform or fusion")
        if self.uniform and self.plan is not None:
            raise BudgetError("uniform and plan both decide the heads of every layer; give one of them")

    def at_budget(self, share: float) -> DHASettings:
        """The same choices at another budget. Raises BudgetError where a plan has fixed it."""
        if self.plan is not None:
            raise BudgetError(f"the plan {self.plan} fixes the KV budget; leave it out to vary it")
        return dataclasses.replace(self, kv_budget=share)


SETTINGS = DHASettings
