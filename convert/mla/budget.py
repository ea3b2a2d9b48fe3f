"""How many cache elements a converted layer may hold, and the ways to split them. No torch, no weights."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from mhconvert.convert.errors import BudgetError
from mhconvert.convert.families import AttentionFacts, attention_facts
from mhconvert.convert.mla.settings import MLASettings

# Shares of a layer's elements that the rotary key may take; each is tried on the layer's own output error.
ROPE_SHARES = {
    "quick": (1 / 6, 1 / 4, 1 / 3),
    "default": (1 / 8, 1 / 6, 1 / 5, 1 / 4, 1 / 3, 2 / 5, 1 / 2),
    "high": (1 / 12, 1 / 8, 1 / 6, 1 / 5, 1 / 4, 3 / 10, 1 / 3, 2 / 5, 1 / 2),
}


@dataclass(frozen=True)
class LayerBudget:
    """elements: of the latent cache per token and layer. kv_lora_rank, qk_rope_head_dim: fixed sizes, or None
    when the pass chooses the split. donor_elements = 2 G d; frequencies: rotary pairs of a head; kv_heads G;
    key_scales: of the elements, those that hold 1 / RMS of a donor's normed keys.
    """

    elements: int
    kv_lora_rank: int | None
    qk_rope_head_dim: int | None
    donor_elements: int
    frequencies: int
    kv_heads: int
    key_scales: int = 0

    @property
    def all_components(self) -> int:
        """One for each rotary pair of each KV head."""
        return self.frequencies * self.kv_heads

    def component_choices(self, effort: str) -> list[int]:
        """Numbers R of rotary components to try, each leaving the latent at least one element."""
        if self.qk_rope_head_dim is not None:
            return [self.qk_rope_head_dim // 2]
        free = self.elements - self.key_scales
        largest = min(self.all_components, (free - 1) // 2)
        counts = {min(largest, max(1, round(share * free / 2))) for share in ROPE_SHARES[effort]}
        if free >= self.donor_elements:
            counts = {self.all_components}  # every key rotates and every value fits: exact
        return sorted(counts)

    def rank(self, components: int) -> int:
        """Width of the latent beside `components` rotary ones."""
        return self.elements - self.key_scales - 2 * components


def layer_budget(config: Any, settings: MLASettings) -> LayerBudget:
    """The elements per token and layer that `settings` grant a donor with `config`.

    Raises BudgetError, with the range that is possible, when its geometry cannot express them.
    """
    facts = attention_facts(config)
    head_dim, scales = facts.head_dim, facts.key_scales
    donor = 2 * facts.kv_heads * head_dim
    if settings.kv_lora_rank is not None and settings.qk_rope_head_dim is not None:
        return _explicit(settings.kv_lora_rank, settings.qk_rope_head_dim, facts)
    elements = round(settings.kv_budget * donor)
    smallest = (3 if settings.profile == "quality" else 6) + scales
    if elements < smallest:
        lowest = math.ceil(1e4 * smallest / donor) / 1e4
        raise BudgetError(
            f"kv_budget={settings.kv_budget} leaves {elements} of the donor's {donor} KV elements per token and "
            f"layer; choose between {lowest:.4f} and 1"
        )
    rank = rope = None
    if settings.profile == "portable":
        components = head_dim // 2
        while 2 * components > max(2, elements // 3):
            components //= 2
        rope = 2 * components
        rank = min(elements - rope, donor - rope)
        elements = rank + rope
    return LayerBudget(elements, rank, rope, donor, facts.rotary_dim // 2, facts.kv_heads, scales)


def _explicit(rank: int, rope: int, facts: AttentionFacts) -> LayerBudget:
    keys, turned = facts.kv_heads * facts.head_dim, facts.kv_heads * facts.rotary_dim
    if rope < 2 or rope % 2 or rope > turned:
        width = "head_dim" if turned == keys else "rotary width"
        raise BudgetError(
            f"qk_rope_head_dim={rope} must be even and between 2 and num_key_value_heads·{width} = {turned}"
        )
    most = 2 * keys - rope
    if not 1 <= rank <= most:
        raise BudgetError(
            f"kv_lora_rank={rank} is outside 1 … 2·num_key_value_heads·head_dim − qk_rope_head_dim = {most}"
        )
    scales = facts.key_scales
    return LayerBudget(
        rank + rope + scales, rank, rope, 2 * keys, facts.rotary_dim // 2, facts.kv_heads, scales
    )


def check_series(budget: LayerBudget) -> None:
    """A stock class holds each frequency once. Raises BudgetError when the rotary key is wider than that."""
    assert budget.qk_rope_head_dim is not None
    if budget.qk_rope_head_dim > 2 * budget.frequencies:
        raise BudgetError(
            f"qk_rope_head_dim={budget.qk_rope_head_dim} exceeds head_dim = {2 * budget.frequencies}, the most "
            "that --profile portable can express; choose less or --profile quality"
        )
