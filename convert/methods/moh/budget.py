"""Shares of heads as whole numbers of them, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mhconvert.errors import BudgetError

from .settings import MoHSettings

ROUNDING = 1e-9  # of a head: 2 / 3 of nine heads are six
SURVEYED = 6  # numbers of active heads, at most, at which a survey measures a layer


@dataclass(frozen=True)
class Heads:
    """Heads (or groups of them) of each layer: `units` in all, `shared` of every token, `active` of a token.

    free: whether the sum of `active` may be divided otherwise over the layers.
    """

    units: int
    shared: tuple[int, ...]
    active: tuple[int, ...]
    free: bool

    @property
    def least(self) -> list[int]:
        """Of active heads, in each layer."""
        return [max(1, n) for n in self.shared]

    def survey_shares(self) -> tuple[float, ...]:
        """Active heads at which a survey measures a layer, as shares: at most SURVEYED, and all of them."""
        numbers = range(min(self.least), self.units)
        step = -(-len(numbers) // SURVEYED)
        return (*(n / self.units for n in numbers[:: step or 1]), 1.0)


def heads_of(settings: MoHSettings, units: int, layers: int, survey: bool) -> Heads:
    """What `settings` mean for `layers` layers of `units` heads or groups. survey: every layer has its share alone.

    Raises BudgetError for numbers that do not fit, naming the layer.
    """
    kind = settings.route
    shared = _numbers(settings.shared, units, layers, "shared", kind)
    least = [max(1, n) for n in shared]
    if isinstance(settings.active, list):
        active, free = _numbers(settings.active, units, layers, "active", kind), False
    else:
        share = float(settings.active)  # type: ignore[arg-type]  # a list was the case above
        each = int(share * units + ROUNDING)
        # As many shared heads as active ones: no layer routes, also where the share is no whole number of heads.
        alike = settings.uniform or settings.shared_heads == "first" or survey or share == settings.shared
        if survey:
            shared = [min(n, each) for n in shared]
            least = [max(1, n) for n in shared]
        total = each * layers if alike else int(share * units * layers + ROUNDING)
        if total < sum(least):
            raise BudgetError(
                f"active={share:g} is {total} of {units * layers} {kind} and shared={settings.shared} takes "
                f"{sum(least)} of them; choose a smaller shared, or active ≥ {_up(sum(least) / units / layers)}"
            )
        first = [total // layers + (index < total % layers) for index in range(layers)]
        active = first if alike else _at_least(first, least)
        free = not alike and sum(least) < total < units * layers
    for index, (some, all_of_them) in enumerate(zip(shared, active, strict=True)):
        if not max(1, some) <= all_of_them <= units:
            raise BudgetError(
                f"layer {index}: {all_of_them} active {kind}, of which {some} are shared; a layer has {units}, and "
                "shared ones are active"
            )
    return Heads(units, tuple(shared), tuple(active), free)


def _numbers(value: Any, units: int, layers: int, name: str, kind: str) -> list[int]:
    if not isinstance(value, Sequence):
        return [int(value * units + ROUNDING)] * layers
    if len(value) != layers:
        raise BudgetError(f"{name} has {len(value)} entries and the donor {layers} layers")
    found = [entry if isinstance(entry, int) else int(entry * units + ROUNDING) for entry in value]
    for index, number in enumerate(found):
        if number > units:
            raise BudgetError(f"{name}, layer {index}: {number} {kind}, and the donor has {units} in a layer")
    return found


def _at_least(numbers: list[int], least: list[int]) -> list[int]:
    """The same sum, every entry as large as its least."""
    found = [max(n, some) for n, some in zip(numbers, least, strict=True)]
    over = sum(found) - sum(numbers)
    while over:
        index = max(range(len(found)), key=lambda i: found[i] - least[i])
        found[index] -= 1
        over -= 1
    return found


def _up(share: float) -> str:
    """A share that is no smaller, in four digits."""
    return f"{min(1.0, -(-share * 1e4 // 1) / 1e4):g}"
