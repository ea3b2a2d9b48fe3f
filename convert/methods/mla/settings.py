"""What a user may choose about an MLA conversion."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Protocol

from mhconvert.errors import BudgetError

from ...validation.option import Option, Takes, default
from ...validation.settings import Settings
from ..protected_heads import PROTECT, read_protected
from .plan_file import read_plan

Profile = Literal["quality", "portable"]
Bits = Literal["16", "auto", "2", "3", "4", "5", "6", "7", "8"]
RANGE = "is outside (0, 1]; it is a share of the donor's KV cache"


class CodeSettings(Protocol):
    """What coded latents read of a user's choices."""

    @property
    def kv_budget(self) -> float: ...
    @property
    def kv_bits(self) -> str: ...
    @property
    def plan(self) -> Any: ...
    @property
    def protect(self) -> Any: ...


@dataclass(frozen=True)
class MLASettings(Settings):
    """The size of the latent cache, and how it may differ from layer to layer."""

    fault = BudgetError
    instead_of_budget: ClassVar[dict[str, str]] = dict.fromkeys(
        ("kv_lora_rank", "qk_rope_head_dim"), "--kv-lora-rank and --qk-rope-head-dim"
    )
    earlier: ClassVar[dict[str, Any]] = {"kv_bits": "16", "plan": None}

    kv_budget: Annotated[
        float,
        Option(
            "Share of the bytes of the donor's 16-bit KV cache that the latent cache may have; with kv_bits 16 of the "
            "donor's KV elements per token.",
            "SHARE",
            gt=0,
            le=1,
            range_hint=RANGE,
        ),
    ] = 0.5
    kv_lora_rank: Annotated[
        int | None,
        Option("Width of the latent, together with qk_rope_head_dim instead of kv_budget.", "N", ge=1),
    ] = None
    qk_rope_head_dim: Annotated[
        int | None,
        Option("Width of the rotary key, together with kv_lora_rank instead of kv_budget.", "N", ge=2),
    ] = None
    profile: Annotated[
        Profile,
        Option(
            "quality: ranks and rotary frequencies may differ by layer. portable: one rank and one geometric "
            "frequency series for all layers, as stock latent-attention classes need them, in the widths that "
            "serving kernels accept: the largest row of 320, 512 or 576 elements that is at least half of what the "
            "budget allows."
        ),
    ] = "quality"

    kv_bits: Annotated[
        Takes[Bits, int],
        Option(
            "auto: the cache is coded; each component of a joint latent of keys and values has the 0 to 8 bits that it "
            "is worth. 16 with profile portable, explicit widths, or moh behind it in a chain. 2 to 8: coded too, and "
            "each component has so many bits or none. 16: cache elements of the weights' dtype, as engines know them.",
            parse=str,
            also=int,
        ),
    ] = default("auto")

    plan: Annotated[
        Any,
        Option(
            "Components of every layer by their bits, with coded latents: a JSON file with layers such as "
            "{components_by_bits: {8: 4, 2: 90}}, as mhconvert.json, report.json and `--dry-run --survey --json` have "
            "them.",
            "FILE",
        ),
    ] = None

    protect: Annotated[Any, PROTECT] = None

    @property
    def coded(self) -> bool:
        """Whether the cache holds codes instead of elements."""
        return self.kv_bits != "16"

    def check(self) -> None:
        """`kv_bits` auto is 16 where engines read elements or widths are given, so that a saved recipe says which.

        Raises BudgetError for one of the two widths without the other, and for a code or its plan in those places.
        """
        self._set("protect", read_protected(self.protect))
        fixed = self._of_elements()
        if fixed is not None and self.kv_bits == "auto":
            self._set("kv_bits", "16")
        wrong = f"kv_bits {self.kv_bits}" if self.coded else "a plan" if self.plan is not None else None
        if fixed is not None and wrong is not None:
            raise BudgetError(
                f"{wrong} does not go with {fixed}, which has elements of 16 bits; leave one out"
            )
        if self.plan is not None:
            if not self.coded:
                raise BudgetError(
                    "a plan says how many components have how many bits; use it with kv_bits auto"
                )
            self._set("plan", read_plan(self.plan))
        if (self.kv_lora_rank is None) != (self.qk_rope_head_dim is None):
            raise BudgetError("kv_lora_rank and qk_rope_head_dim go together; give both, or kv_budget alone")

    def _of_elements(self) -> str | None:
        """The choice that only elements of 16 bits can meet, in words, or None."""
        if self.profile == "portable":
            return "profile portable"
        return None if self.kv_lora_rank is None else "kv_lora_rank and qk_rope_head_dim"

    def with_elements(self) -> MLASettings:
        """The same choices with cache elements of 16 bits, where `kv_bits` auto leaves that open."""
        is_open = self.kv_bits == "auto" and self.plan is None
        return dataclasses.replace(self, kv_bits=16) if is_open else self

    def at_budget(self, share: float) -> MLASettings:
        """The same choices at another budget. Raises BudgetError where explicit sizes have fixed it."""
        if self.kv_lora_rank is not None:
            raise BudgetError(
                "kv_lora_rank and qk_rope_head_dim fix the KV budget; leave them out to vary it"
            )
        if self.plan is not None:
            raise BudgetError("the plan fixes the KV budget; leave it out to vary it")
        return dataclasses.replace(self, kv_budget=share)


SETTINGS = MLASettings
