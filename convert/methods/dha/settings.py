"""What a user may choose about a DHA conversion."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mhconvert.errors import BudgetError

from ...validation.field_types import is_number

Fusion = Literal["closed", "trained"]
PLANNED = (
    "kv_heads",
    "k_heads",
    "v_heads",
    "k_map",
    "v_map",
)  # of a layer in a plan; what else it has is a report's


@dataclass(frozen=True)
class DHASettings:
    """kv_budget: share of the donor's K and V heads, all layers together, that may be left, in (0, 1].

    uniform: as many K as V heads in every layer, read by groups of one size: the donor's own architecture, with fewer
    KV heads. regroup: whether query heads that read one KV head in the donor may read different ones (None: with up to
    nine query heads they may, beyond that what measures better). min_heads, max_heads: K heads, and V heads, of any
    layer; max None: the donor's. head_multiple: that these numbers are multiples of (of devices in tensor parallelism).
    plan: the heads of each layer instead of a budget, as `heads.layer_heads` takes them; or a JSON file that has them.
    fusion: "closed": heads are fused in closed form. "trained": they are only turned towards each other, and the result
    is the donor until `mhconvert heal --fusion` trains them to be one.
    """

    kv_budget: float = 0.5
    uniform: bool = False
    regroup: bool | None = None
    min_heads: int = 1
    max_heads: int | None = None
    head_multiple: int = 1
    plan: Any = None
    fusion: Fusion = "closed"

    def __post_init__(self) -> None:
        if not is_number(self.kv_budget) or not 0 < self.kv_budget <= 1:
            raise BudgetError(
                f"kv_budget={self.kv_budget} is outside (0, 1]; it is a share of the donor's KV heads"
            )
        for name in ("uniform", "regroup"):
            value = getattr(self, name)
            if not isinstance(value, bool) and (name, value) != ("regroup", None):
                raise BudgetError(f"{name}={value!r} is neither true nor false")
        for name in ("min_heads", "max_heads", "head_multiple"):
            value = getattr(self, name)
            if (name, value) == ("max_heads", None):
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise BudgetError(f"{name}={value} is not a number of heads from 1")
        if self.max_heads is not None and self.max_heads < self.min_heads:
            raise BudgetError(f"max_heads={self.max_heads} is less than min_heads={self.min_heads}")
        if self.fusion not in ("closed", "trained"):
            raise BudgetError(f"fusion '{self.fusion}' is not one of closed, trained")
        if self.uniform and self.fusion == "trained":
            raise BudgetError("a uniform plan is fused in closed form; leave out uniform or fusion")
        if self.plan is not None:
            self._take_plan()

    def _take_plan(self) -> None:
        for name in ("kv_budget", "uniform", "min_heads", "max_heads", "head_multiple"):
            if getattr(self, name) != getattr(DHASettings, name):
                raise BudgetError(f"a plan decides the heads of every layer; leave out {name} or the plan")
        layers = _read_plan(Path(self.plan)) if isinstance(self.plan, (str, Path)) else self.plan
        if not isinstance(layers, (list, tuple)) or not all(isinstance(layer, dict) for layer in layers):
            raise BudgetError(
                f"plan {self.plan} is no list of layers such as {{k_heads: 2, v_heads: 1}}, and no file with one"
            )
        kept = [{name: layer[name] for name in PLANNED if name in layer} for layer in layers]
        object.__setattr__(self, "plan", kept)

    def at_budget(self, share: float) -> DHASettings:
        """The same choices at another budget. Raises BudgetError where a plan has fixed it."""
        if self.plan is not None:
            raise BudgetError("the plan fixes the KV budget; leave it out to vary it")
        return dataclasses.replace(self, kv_budget=share)


def _read_plan(path: Path) -> Any:
    """The layers in a plan file: {"layers": [{"kv_heads": 3}, …]}, as in the JSON of a dry run, and in mhconvert.json
    and report.json of a converted checkpoint."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))["layers"]
    except OSError as error:
        raise BudgetError(f"plan {path} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise BudgetError(f'plan {path} is not JSON with {{"layers": […]}}') from error


SETTINGS = DHASettings
