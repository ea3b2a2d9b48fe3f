"""What a user may choose about an MLA conversion."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

from mhconvert.errors import BudgetError

Profile = Literal["quality", "portable"]


@dataclass(frozen=True)
class MLASettings:
    """kv_budget: share of the donor's KV elements per token that the latent cache may hold, in (0, 1].

    kv_lora_rank, qk_rope_head_dim: explicit sizes instead of the budget (both or neither); elements per token.
    profile "quality": ranks and rotary frequencies may differ from layer to layer; "portable": one rank and one
    geometric frequency series for all layers, as stock latent-attention classes want it, in the widths that
    serving kernels accept (head_dim 64 or 128: a rotary key of 64 elements).
    """

    kv_budget: float = 0.5
    kv_lora_rank: int | None = None
    qk_rope_head_dim: int | None = None
    profile: Profile = "quality"

    def __post_init__(self) -> None:
        if not 0 < self.kv_budget <= 1:
            raise BudgetError(
                f"kv_budget={self.kv_budget} is outside (0, 1]; it is a share of the donor's KV cache"
            )
        if (self.kv_lora_rank is None) != (self.qk_rope_head_dim is None):
            raise BudgetError("kv_lora_rank and qk_rope_head_dim go together; give both, or kv_budget alone")
        if self.profile not in ("quality", "portable"):
            raise BudgetError(f"profile '{self.profile}' is not one of quality, portable")

    def at_budget(self, share: float) -> MLASettings:
        """The same choices at another budget. Raises BudgetError where explicit sizes have fixed it."""
        if self.kv_lora_rank is not None:
            raise BudgetError(
                "kv_lora_rank and qk_rope_head_dim fix the KV budget; leave them out to vary it"
            )
        return dataclasses.replace(self, kv_budget=share)


SETTINGS = MLASettings
