"""A budget as whole numbers of K heads and V heads per layer, within the user's limits; or as a plan says."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from mhconvert.errors import BudgetError

from ...families.facts import AttentionFacts
from ..budget_division import raised
from ..protected_heads import groups_of, protected_heads
from .planned_layers import LayerHeads, equal_layers, layer_heads
from .settings import DHASettings

ROUNDING = 1e-9  # of a head, so that 2 / 3 of six heads are four
SURVEYED = 6  # a survey measures a layer at no more than so many numbers of heads


@dataclass(frozen=True)
class HeadBudget:
    """How many heads a conversion may leave; K and V heads are counted together.

    Attributes:
        total: of all layers together.
        layers: their number.
        whole: heads of one layer of the donor, 2 G.
        counts, k_counts: numbers of V heads and of K heads that a layer may have, ascending.
        step: by which a layer's number of heads can grow.
        uniform: whether `equal`, and all layers have the same number.
        equal: whether every layer has as many K as V heads, read by the same groups of one size.
        fixed: what a plan says of each layer; None: there is no plan.
        kept: per layer, KV heads that are not fused; empty: none.
    """

    total: int
    layers: int
    whole: int
    counts: tuple[int, ...]
    k_counts: tuple[int, ...]
    step: int
    uniform: bool = False
    equal: bool = False
    fixed: tuple[LayerHeads, ...] | None = None
    kept: tuple[tuple[int, ...], ...] = ()

    @property
    def floors(self) -> list[int]:
        """The least heads of each layer: with the kept ones, and one for the others together."""
        return [sum(self._floor(index)) for index in range(self.layers)]

    def _floor(self, index: int) -> tuple[int, int]:
        """The least K and V heads of layer `index`. Raises BudgetError where it may not have so many."""
        kept = len(self.kept[index]) if self.kept else 0
        need = kept + (0 < kept < self.whole // 2)
        if need > min(self.counts[-1], self.k_counts[-1]):
            raise BudgetError(
                f"layer {index}: {kept} KV heads are protected, and with one for the others that is more than the most "
                f"it may have, {self.counts[-1]}; leave out max_heads or head_multiple, or protect fewer"
            )
        k_heads, v_heads = (min(n for n in each if n >= need) for each in (self.k_counts, self.counts))
        return k_heads, v_heads

    @property
    def least(self) -> int:
        return self.k_counts[0] + self.counts[0]

    @property
    def most(self) -> int:
        return self.k_counts[-1] + self.counts[-1]

    @property
    def levels(self) -> list[int]:
        """Heads that a layer of an `equal` plan may have, ascending."""
        return [2 * n for n in self.counts]

    @property
    def stock(self) -> bool:
        """Whether the result is plain grouped-query attention of one size, for some order of the query heads."""
        if self.fixed is None:
            return self.uniform
        groups = {
            (layer.k_heads, max(map(layer.k_map.count, layer.k_map)) * layer.k_heads == len(layer.k_map))
            if layer.k_map is not None and layer.k_map == layer.v_map and layer.k_heads is not None
            else (0, False)
            for layer in self.fixed
        }
        return len(groups) == 1 and groups.pop()[1]

    @property
    def free(self) -> bool:
        """Whether layers may differ."""
        return (
            not self.uniform
            and self.fixed is None
            and sum(self.floors) < self.total < self.most * self.layers
        )

    def spread(self) -> list[int]:
        """Heads of each layer before a survey: as equal as possible, with the remainder in the first layers."""
        if self.fixed is not None:
            return [layer.kv_heads for layer in self.fixed]
        if self.uniform:
            return [self.total // self.layers] * self.layers
        if self.equal:
            return self._level_spread()
        steps, extra = divmod((self.total - self.least * self.layers) // self.step, self.layers)
        even = [self.least + self.step * (steps + (index < extra)) for index in range(self.layers)]
        return raised(even, self.floors, self.step)

    def _level_spread(self) -> list[int]:
        """As `spread`, of an `equal` plan: the largest of `levels` that all can have, the next for the first layers."""
        base = max(level for level in self.levels if level * self.layers <= self.total)
        wider = next((level for level in self.levels if level > base), base)
        more = (self.total - base * self.layers) // max(1, wider - base)
        return [wider if index < more else base for index in range(self.layers)]

    def splits(self, index: int, heads: int) -> list[tuple[int, int]]:
        """The pairs (K heads, V heads) that layer `index` may have when it has `heads` in all."""
        if self.fixed is not None:
            layer = self.fixed[index]
            if layer.k_heads is not None and layer.v_heads is not None:
                return [(layer.k_heads, layer.v_heads)]
        if self.equal:
            return [(heads // 2, heads // 2)]
        floor = self._floor(index)
        fitting = ((n, heads - n) for n in self.k_counts if heads - n in self.counts and n >= floor[0])
        return [pair for pair in fitting if pair[1] >= floor[1]] or [floor]

    def halves(self, index: int, heads: int) -> tuple[int, int]:
        """The one of `splits` with the most equal numbers."""
        return min(self.splits(index, heads), key=lambda pair: abs(pair[0] - pair[1]))

    def survey_shares(self) -> tuple[float, ...]:
        """Shares of a donor layer's heads at which a survey measures it."""
        # Levels lie far apart, so that what lies beyond the last one measured would be a guess.
        every = self.levels if self.equal else list(range(self.least, self.most, self.step))
        numbers = every or [self.least]
        if len(numbers) > SURVEYED:
            ratio = (numbers[-1] / numbers[0]) ** (1 / (SURVEYED - 1))
            wished = [numbers[0] * ratio**i for i in range(SURVEYED)]
            numbers = sorted({min(numbers, key=lambda n: abs(n - w)) for w in wished})
        return tuple(n / self.whole for n in numbers)


def head_budget(config: Any, settings: DHASettings, facts: AttentionFacts) -> HeadBudget:
    """The heads that `settings` leave a donor. Raises BudgetError for settings that no numbers of heads fulfil."""
    layers, groups = config.num_hidden_layers, facts.kv_heads
    if groups == 1:
        raise BudgetError("the donor has one KV head (multi-query attention); there is nothing to fuse")
    whole, step = 2 * groups, settings.head_multiple
    if settings.plan is not None:
        return _planned(config, settings, facts)
    if facts.qk_norm:
        _require_all_keys(settings, groups)
    highest = min(settings.max_heads or groups, groups)
    counts = tuple(n for n in range(step, highest + 1, step) if n >= settings.min_heads)
    grouped = (groups, "KV") if settings.regroup is False else (facts.heads, "query")
    equal = settings.uniform or settings.equal_heads
    if equal:
        counts = tuple(n for n in counts if grouped[0] % n == 0)
    if not counts:
        raise BudgetError(
            f"no number of heads is a multiple of {step} from {settings.min_heads} to {highest}"
            + (" that divides the {} {} heads".format(*grouped) if equal else "")
            + f"; the donor has {groups} KV heads"
        )
    total = math.floor(settings.kv_budget * whole * layers + ROUNDING)
    if settings.uniform:
        fitting = [n for n in counts if 2 * n * layers <= total]
        if not fitting:
            raise _too_small(settings.kv_budget, counts, groups, "a uniform plan has")
        return HeadBudget(
            2 * fitting[-1] * layers, layers, whole, counts, counts, step, uniform=True, equal=True
        )
    k_counts = (groups,) if facts.qk_norm else counts
    named = protected_heads(settings.protect, layers, facts.heads)
    kept = tuple(map(tuple, groups_of(named, facts.heads, groups)))
    found = HeadBudget(total, layers, whole, counts, k_counts, step, equal=equal, kept=kept)
    if total < found.least * layers:
        raise _too_small(settings.kv_budget, counts, groups, "layers have", facts.qk_norm is not None)
    _require_floors(found, settings.kv_budget)
    total = min(total, found.most * layers)
    spare = 0 if equal else (total - found.least * layers) % step
    return replace(found, total=total - spare)


def _planned(config: Any, settings: DHASettings, facts: AttentionFacts) -> HeadBudget:
    """The heads that a plan says. Raises BudgetError for a plan that does not fit the donor."""
    groups = facts.kv_heads
    fixed = layer_heads(settings.plan, config, facts)
    if settings.equal_heads:
        fixed = equal_layers(fixed, groups if settings.regroup is False else facts.heads)
    every = tuple(range(1, groups + 1))
    return HeadBudget(
        total=sum(layer.kv_heads for layer in fixed),
        layers=config.num_hidden_layers,
        whole=2 * groups,
        counts=every,
        k_counts=every[-1:] if facts.qk_norm else every,
        step=1,
        equal=settings.equal_heads,
        fixed=fixed,
    )


def _require_floors(found: HeadBudget, budget: float) -> None:
    """Raises BudgetError where the protected heads, and one for the others of their layers, are more than all."""
    every, least, kept = found.whole * found.layers, sum(found.floors), sum(map(len, found.kept))
    if found.total < least:
        raise BudgetError(
            f"kv_budget={budget} is {found.total} of {every} heads, and with {kept} protected KV heads layers have at "
            f"least {least}; choose kv_budget ≥ {math.ceil(1e4 * least / every) / 1e4:g} or protect fewer"
        )


def _require_all_keys(settings: DHASettings, groups: int) -> None:
    """Raises BudgetError for limits that the donor's own number of K heads, which have a norm, is not within."""
    if settings.max_heads is not None and settings.max_heads < groups:
        limit = f"max_heads={settings.max_heads}"
    elif groups % settings.head_multiple:
        limit = f"head_multiple={settings.head_multiple}"
    else:
        return
    raise BudgetError(
        f"the donor's keys are divided by their RMS, so its {groups} K heads stay as they are, which {limit} does not "
        "allow; leave it out"
    )


def _too_small(
    budget: float, counts: tuple[int, ...], groups: int, who: str, all_keys: bool = False
) -> BudgetError:
    """The error for a budget below the least of `counts`, with the nearest budgets that are possible.

    Args:
        all_keys: whether every K head stays and `counts` are of V heads alone.
    """

    def share(n: int) -> str:
        k_heads = groups if all_keys else n
        named = f"{k_heads} K and {n} V" if all_keys else f"{n} of {groups}"
        return f"{math.ceil(1e4 * (k_heads + n) / (2 * groups)) / 1e4:g} ({named})"

    why = "; its keys are divided by their RMS, so K heads are not fused" if all_keys else ""
    return BudgetError(
        f"kv_budget={budget} leaves fewer heads than {who} at least ({groups if all_keys else counts[0]} K and "
        f"{counts[0]} V each{why}); the nearest that it can: {', '.join(map(share, counts[:3]))}"
    )
