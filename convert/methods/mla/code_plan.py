"""A user's plan of how many components of every layer have how many bits, checked. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mhconvert.errors import BudgetError

from .latent_code import WIDTHS, row_bytes


def planned_bits(
    plan: Sequence[dict[str, Any]],
    elements: int,
    widths: Sequence[int],
    budget: int,
    tokens: Sequence[int],
    unit: str = "bytes a token",
) -> list[Tensor]:
    """For each layer (elements,), the bits of its components, the most for those that are worth most, int64.

    A layer that the plan gives no components_by_bits has none.

    Args:
        budget: in `unit`.
        tokens: of which each layer holds the codes; 1 where the budget is of a token.

    Raises:
        BudgetError: naming the layer and the number that does not fit the donor, the widths or the budget in bytes.
    """
    if len(plan) != len(tokens):
        raise BudgetError(f"the plan has {len(plan)} layers and the donor {len(tokens)}")
    used, bits = 0, []
    for index, layer in enumerate(plan):
        if "components_by_bits" not in layer:
            bits.append(torch.zeros(elements, dtype=torch.int64))
            continue
        counts = _counts(f"plan, layer {index}", layer["components_by_bits"], elements, widths)
        used += row_bytes(counts) * tokens[index]
        if used > budget:
            raise BudgetError(
                f"plan, layer {index}: {used:,} {unit} up to here are over the budget of {budget:,}; plan "
                "fewer, or raise kv_budget"
            )
        repeated = [torch.full((count,), width) for width, count in zip(WIDTHS, counts, strict=True)]
        bits.append(torch.cat([*repeated, torch.zeros(elements - sum(counts), dtype=torch.int64)]))
    return bits


def _counts(place: str, by_bits: dict[str, Any], elements: int, widths: Sequence[int]) -> list[int]:
    """How many components have each of WIDTHS. Raises BudgetError, beginning with `place`."""
    allowed = [str(width) for width in widths]
    for width, count in by_bits.items():
        if width not in allowed:
            raise BudgetError(f"{place}: {width} is no number of bits; use {', '.join(allowed)}")
        if isinstance(count, bool) or not isinstance(count, int) or count < 0:
            raise BudgetError(f"{place}: {count!r} components of {width} bits is not a whole number from 0")
    total = sum(by_bits.values())
    if not 0 < total <= elements:
        raise BudgetError(f"{place}: {total} components; the donor's layers have from 1 to {elements}")
    return [by_bits.get(str(width), 0) for width in WIDTHS]
