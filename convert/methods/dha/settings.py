"""What a user may choose about a DHA conversion."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from mhconvert.errors import BudgetError

from ...validation.option import Option
from ...validation.settings import Settings
from ..plan_file import read_layers
from ..protected_heads import PROTECT, read_protected

Fusion = Literal["closed", "trained"]
PLANNED = (
    "kv_heads",
    "k_heads",
    "v_heads",
    "k_map",
    "v_map",
)  # keys of a layer in a plan that a plan may have
DECIDED_BY_A_PLAN = ("kv_budget", "uniform", "min_heads", "max_heads", "head_multiple", "protect")
RANGE = "is outside (0, 1]; it is a share of the donor's KV heads"
HEADS = "is not a number of heads from 1"


@dataclass(frozen=True)
class DHASettings(Settings):
    """How many K heads and V heads each layer keeps, and how heads are fused."""

    fault = BudgetError
    instead_of_budget: ClassVar[dict[str, str]] = {"plan": "the heads of every layer by --plan"}
    earlier: ClassVar[dict[str, Any]] = {"equal_heads": False}

    kv_budget: Annotated[
        float,
        Option(
            "Share of the donor's K and V heads, all layers together, that may be left.",
            "SHARE",
            gt=0,
            le=1,
            range_hint=RANGE,
        ),
    ] = 0.5
    uniform: Annotated[
        bool,
        Option(
            "As many K as V heads in every layer, read by groups of one size: the donor's own architecture, no "
            "remote code."
        ),
    ] = False
    equal_heads: Annotated[
        bool,
        Option(
            "As many K as V heads within a layer, read by groups of one size, so that `export --to nemotron-nas` holds "
            "the result; layers may differ. A survey says what that costs."
        ),
    ] = False
    regroup: Annotated[
        bool | None,
        Option(
            "Whether query heads that read one KV head in the donor may read different ones.",
            flag="--regroup/--no-regroup",
            default="yes up to nine query heads, beyond that what measures better",
        ),
    ] = None
    min_heads: Annotated[
        int, Option("K heads, and V heads, of any layer at least.", "N", ge=1, range_hint=HEADS)
    ] = 1
    max_heads: Annotated[
        int | None,
        Option(
            "K heads, and V heads, of any layer at most.", "N", ge=1, range_hint=HEADS, default="the donor's"
        ),
    ] = None
    head_multiple: Annotated[
        int,
        Option(
            "Numbers of heads are multiples of N, such as the devices of tensor parallelism.",
            "N",
            ge=1,
            range_hint=HEADS,
        ),
    ] = 1
    plan: Annotated[
        Any,
        Option(
            "The heads of every layer, instead of a budget: a JSON file with layers such as {k_heads: 2, v_heads: 1}, "
            "as mhconvert.json, report.json and `--dry-run --survey --json` have them.",
            "FILE",
        ),
    ] = None
    fusion: Annotated[
        Fusion,
        Option(
            "closed: heads are fused in closed form. trained: heads are only turned towards each other, and the "
            "result is the donor until `mhconvert heal --fusion` trains them to be one."
        ),
    ] = "closed"
    protect: Annotated[Any, PROTECT] = None

    def check(self) -> None:
        """Raise BudgetError for bounds that cross and choices that exclude each other; read the plan."""
        if self.max_heads is not None and self.max_heads < self.min_heads:
            raise BudgetError(f"max_heads={self.max_heads} is less than min_heads={self.min_heads}")
        self._set("protect", read_protected(self.protect))
        if self.protect is not None and (self.uniform or self.equal_heads):
            asked = "uniform" if self.uniform else "equal_heads"
            raise BudgetError(
                f"{asked} has groups of one size, in which no head stays whole; leave out it or protect"
            )
        if self.uniform and self.equal_heads:
            raise BudgetError(
                "a uniform plan has equal heads in every layer; leave out equal_heads or uniform"
            )
        if self.uniform and self.fusion == "trained":
            raise BudgetError("a uniform plan is fused in closed form; leave out uniform or fusion")
        if self.plan is not None:
            self._take_plan()

    def _take_plan(self) -> None:
        for name in DECIDED_BY_A_PLAN:
            if getattr(self, name) != getattr(DHASettings, name):
                raise BudgetError(f"a plan decides the heads of every layer; leave out {name} or the plan")
        layers = read_layers(self.plan, "{k_heads: 2, v_heads: 1}")
        self._set("plan", [{name: layer[name] for name in PLANNED if name in layer} for layer in layers])

    def at_budget(self, share: float) -> DHASettings:
        """The same choices at another budget. Raises BudgetError where a plan has fixed it."""
        if self.plan is not None:
            raise BudgetError("the plan fixes the KV budget; leave it out to vary it")
        return dataclasses.replace(self, kv_budget=share)


SETTINGS = DHASettings
