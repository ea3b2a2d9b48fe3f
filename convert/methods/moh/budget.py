"""Shares of heads as whole numbers of heads in each layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mhconvert.errors import BudgetError

from ..budget_division import raised
from .settings import MoHSettings

ROUNDING = 1e-9  # of a head, so that 2 / 3 of nine heads are six
SURVEYED = 6  # a survey measures a layer at no more than so many numbers of active heads


@dataclass(frozen=True)
class Heads:
    """The routing units of each layer: query heads, or groups of those that read one KV head.

    Attributes:
        units: of a layer.
        shared: per layer, units that every token has.
        active: per layer, units that a token has, the shared ones included.
        free: whether the sum of `active` may be divided otherwise over the layers.
    """

    units: int
    shared: tuple[int, ...]
    active: tuple[int, ...]
    free: bool

    @property
    def least(self) -> list[int]:
        """The least number of active units of each layer."""
        return [max(1, n) for n in self.shared]

    def survey_shares(self) -> tuple[float, ...]:
        """Shares of a layer's units, active, at which a survey measures it: at most SURVEYED, and all of them."""
        numbers = range(min(self.least), self.units)
        step = -(-len(numbers) // SURVEYED)
        return (*(n / self.units for n in numbers[:: step or 1]), 1.0)


def heads_of(settings: MoHSettings, units: int, layers: int, survey: bool, kept: Sequence[int] = ()) -> Heads:
    """The shared and active units of each layer that `settings` ask for.

    Args:
        units: of a layer.
        layers: their number.
        survey: whether every layer has exactly the share of active units, as a survey measures them.
        kept: per layer, protected units, which are shared whatever the share is; empty: none.
    Raises:
        BudgetError: for numbers that do not fit, naming the layer.
    """
    kind = settings.route
    shared = _numbers(settings.shared, units, layers, "shared", kind)
    shared = [max(pair) for pair in zip(shared, kept or shared, strict=True)]
    least = [max(1, n) for n in shared]
    protected = f", {sum(kept)} of which are protected" if any(kept) else ""
    if isinstance(settings.active, list):
        active, free = _numbers(settings.active, units, layers, "active", kind), False
    else:
        share = float(settings.active)  # type: ignore[arg-type]  # a list was the case above
        each = int(share * units + ROUNDING)
        # With equal shares no layer routes, even where the share is no whole number of heads.
        alike = settings.uniform or settings.shared_heads == "first" or survey or share == settings.shared
        if survey:
            shared = [min(n, each) for n in shared]
            least = [max(1, n) for n in shared]
        total = each * layers if alike else int(share * units * layers + ROUNDING)
        if total < sum(least):
            raise BudgetError(
                f"active={share:g} is {total} of {units * layers} {kind} and shared={settings.shared} takes "
                f"{sum(least)} of them{protected}; choose a smaller shared, or active ≥ "
                f"{_up(sum(least) / units / layers)}"
            )
        first = [total // layers + (index < total % layers) for index in range(layers)]
        active = first if alike else raised(first, least)
        free = not alike and sum(least) < total < units * layers
    for index, (some, all_of_them) in enumerate(zip(shared, active, strict=True)):
        if not max(1, some) <= all_of_them <= units:
            own = f" ({kept[index]} protected)" if any(kept) else ""
            raise BudgetError(
                f"layer {index}: {all_of_them} active {kind}, of which {some} are shared{own}; a layer has {units}, "
                "and shared ones are active"
            )
    return Heads(units, tuple(shared), tuple(active), free)


def _numbers(value: Any, units: int, layers: int, name: str, kind: str) -> list[int]:
    """Units of each layer, from a share of `units`, or a list of shares or numbers, one for each layer.

    Raises BudgetError for a list of another length, or a number beyond `units`."""
    if not isinstance(value, Sequence):
        return [int(value * units + ROUNDING)] * layers
    if len(value) != layers:
        raise BudgetError(f"{name} has {len(value)} entries and the donor {layers} layers")
    numbers = [entry if isinstance(entry, int) else int(entry * units + ROUNDING) for entry in value]
    for index, number in enumerate(numbers):
        if number > units:
            raise BudgetError(f"{name}, layer {index}: {number} {kind}, and the donor has {units} in a layer")
    return numbers


def _up(share: float) -> str:
    """The share rounded up to four digits."""
    return f"{min(1.0, -(-share * 1e4 // 1) / 1e4):g}"
