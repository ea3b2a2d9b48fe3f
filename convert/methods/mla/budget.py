"""Cache elements of a converted layer, and the ways to split them into latent and rotary key. No torch, no weights."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from mhconvert.errors import BudgetError, UnsupportedError

from ...families.facts import AttentionFacts, attention_facts
from .engine_rows import KERNEL_SHAPES, aimed_row, row_notice
from .settings import MLASettings

# Shares of a layer's elements that the rotary key may take; the one with the smallest output error is chosen.
ROPE_SHARES = {
    "survey": (2 / 5,),
    "quick": (1 / 4, 2 / 5, 1 / 2),
    "default": (1 / 4, 1 / 3, 2 / 5, 1 / 2),
    "high": (1 / 8, 1 / 6, 1 / 4, 1 / 3, 2 / 5, 1 / 2, 3 / 5, 2 / 3),
}
MIN_LAYER_FACTOR, MAX_LAYER_FACTOR = 1 / 2, 2  # bounds of one layer's budget, as multiples of the mean budget
DIVISION = 96  # a budget is divided over layers in steps of 1 / DIVISION of the donor's elements
MIN_ELEMENTS = 3  # of a layer: one rotary component, which is two elements, and a latent of width one
ROUND_WIDTH = 16  # elements: error messages suggest multiples of it


@dataclass(frozen=True)
class LayerBudget:
    """The cache of one layer, in elements per token.

    Attributes:
        elements: of the latent cache.
        kv_lora_rank, qk_rope_head_dim: fixed sizes, or None where the pass chooses the split.
        donor_elements: of the donor's cache, 2 G d.
        frequencies: rotary pairs of a head.
        kv_heads: G, of the donor.
        key_scales: of `elements`, those that hold 1 / RMS of a donor's normed keys.
        notice: what a user should know of the engines that take it; "" where there is nothing to say.
    """

    elements: int
    kv_lora_rank: int | None
    qk_rope_head_dim: int | None
    donor_elements: int
    frequencies: int
    kv_heads: int
    key_scales: int = 0
    notice: str = ""

    @property
    def all_components(self) -> int:
        """The number of rotary components that a donor's keys have: one for each rotary pair of each KV head."""
        return self.frequencies * self.kv_heads

    @property
    def limits(self) -> tuple[int, int]:
        """The least and the most elements that one layer may get when the budget is divided over the layers."""
        least = max(MIN_ELEMENTS + self.key_scales, round(MIN_LAYER_FACTOR * self.elements))
        return min(least, self.elements), min(
            round(MAX_LAYER_FACTOR * self.elements), self.donor_elements + self.key_scales
        )

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
        """The width of the latent, kv_lora_rank, beside `components` rotary components."""
        return self.elements - self.key_scales - 2 * components

    def most_parameters(self, facts: AttentionFacts, hidden: int, effort: str, rope_in_latent: bool) -> int:
        """Of a layer's attention at its widest keys, on a hidden state of `hidden` elements."""
        choices, elements = self.component_choices(effort), self.elements - self.key_scales
        heads, head_dim, rope = facts.heads, facts.head_dim, 2 * max(choices)
        queries = hidden * heads * (head_dim + rope)
        if facts.qk_norm is not None:
            queries = heads * head_dim * (hidden + head_dim + rope) + facts.kv_heads * head_dim * hidden
        projections = hidden * (elements + heads * head_dim + 1)
        reads = elements if rope_in_latent else self.rank(min(choices))
        return queries + projections + 2 * reads * heads * head_dim


def layer_budget(config: Any, settings: MLASettings) -> LayerBudget:
    """The budget of each layer that `settings` leave a donor with `config`.

    With profile portable every layer's rotary key has the width that kernels want at this head_dim, and the whole row
    one that engines take, where the budget allows it.

    Raises:
        BudgetError: for sizes that the donor's geometry cannot express; it names the nearest possible ones.
        UnsupportedError: for a head_dim that the profile does not have.
    """
    facts = attention_facts(config)
    head_dim, scales = facts.head_dim, facts.key_scales
    donor = facts.kv_elements
    if settings.kv_lora_rank is not None and settings.qk_rope_head_dim is not None:
        budget = _explicit(settings.kv_lora_rank, settings.qk_rope_head_dim, facts)
        if settings.profile == "portable" and settings.qk_rope_head_dim != portable_rope(head_dim):
            raise BudgetError(
                f"qk_rope_head_dim={settings.qk_rope_head_dim} has no kernel at head_dim={head_dim}: --profile "
                f"portable needs {portable_rope(head_dim)}; choose that or --profile quality"
            )
        return _noticed(budget, settings, budget.elements)
    elements = round(settings.kv_budget * donor)
    rope = portable_rope(head_dim) if settings.profile == "portable" else None
    smallest = (MIN_ELEMENTS if rope is None else rope + 1) + scales
    if elements < smallest:
        needs = f"{smallest}" if rope is None else f"{smallest} (a rotary key of {rope} and a latent)"
        raise BudgetError(
            f"kv_budget={settings.kv_budget} leaves {elements} of the donor's {donor} KV elements per token and "
            f"layer, and --profile {settings.profile} needs {needs}; the nearest that it can: "
            f"{_nearest(smallest, donor)}"
        )
    allowed, elements = elements, elements if rope is None else aimed_row(elements, donor) or elements
    rank = None if rope is None else elements - rope
    budget = LayerBudget(elements, rank, rope, donor, facts.rotary_dim // 2, facts.kv_heads, scales)
    return _noticed(budget, settings, allowed)


def _noticed(budget: LayerBudget, settings: MLASettings, allowed: int) -> LayerBudget:
    """`budget`, with profile portable of `allowed` elements at most, and what it says about engines."""
    rope = budget.qk_rope_head_dim
    if settings.profile == "quality" or rope is None:
        return budget
    return replace(budget, notice=row_notice(budget.elements, rope, allowed, budget.donor_elements))


def portable_rope(head_dim: int) -> int:
    """qk_rope_head_dim of the kernel shape whose non-rotary part is a whole head; values may be padded to theirs.

    Raises:
        UnsupportedError: for a head_dim that has none.
    """
    for nope, rope, value in KERNEL_SHAPES:
        if nope == head_dim and rope and value >= head_dim:
            return rope
    shapes = ", ".join(map(str, KERNEL_SHAPES))
    raise UnsupportedError(
        f"--profile portable cannot express head_dim={head_dim}: vLLM's MLA kernels accept (qk_nope_head_dim, "
        f"qk_rope_head_dim, v_head_dim) = {shapes}, which leaves head_dim 64, 128 and 192; use --profile quality"
    )


def _nearest(smallest: int, donor: int) -> str:
    """The smallest budgets that are possible, as `0.1693 (65 elements), …`; after the first, round widths."""
    widths = [smallest, *(w for w in range(0, donor + 1, ROUND_WIDTH) if w > smallest)][:3]
    shares = [math.ceil(1e4 * width / donor) / 1e4 for width in widths]
    return ", ".join(f"{share:.4g} ({round(share * donor)} elements)" for share in shares)


def _explicit(rank: int, rope: int, facts: AttentionFacts) -> LayerBudget:
    """The budget of sizes that a user gives: kv_lora_rank and qk_rope_head_dim.

    Raises BudgetError for sizes that the donor's heads cannot have."""
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
