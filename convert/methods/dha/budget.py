"""A budget as whole numbers of K heads and V heads per layer, within the user's limits; or as a plan says."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mhconvert.errors import BudgetError

from ...families.facts import AttentionFacts
from .settings import DHASettings

ROUNDING = 1e-9  # of a head, so that 2 / 3 of six heads are four
SURVEYED = 6  # a survey measures a layer at no more than so many numbers of heads


@dataclass(frozen=True)
class LayerHeads:
    """One layer of a user's plan; what is None the pass chooses.

    Attributes:
        kv_heads: K and V heads together.
        k_heads, v_heads: numbers of each.
        k_map, v_map: (H), the K head and the V head that each query head reads.
    """

    kv_heads: int
    k_heads: int | None = None
    v_heads: int | None = None
    k_map: list[int] | None = None
    v_map: list[int] | None = None


@dataclass(frozen=True)
class HeadBudget:
    """How many heads a conversion may leave; K and V heads are counted together.

    Attributes:
        total: of all layers together.
        layers: their number.
        whole: heads of one layer of the donor, 2 G.
        counts: numbers of K heads, and of V heads, that a layer may have, ascending.
        step: by which a layer's number of heads can grow.
        uniform: whether every layer has as many K as V heads, and all layers the same number.
        fixed: what a plan says of each layer; None: there is no plan.
    """

    total: int
    layers: int
    whole: int
    counts: tuple[int, ...]
    step: int
    uniform: bool = False
    fixed: tuple[LayerHeads, ...] | None = None

    @property
    def least(self) -> int:
        return 2 * self.counts[0]

    @property
    def most(self) -> int:
        return 2 * self.counts[-1]

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
            and self.least * self.layers < self.total < self.most * self.layers
        )

    def spread(self) -> list[int]:
        """Heads of each layer before a survey: as equal as possible, with the remainder in the first layers."""
        if self.fixed is not None:
            return [layer.kv_heads for layer in self.fixed]
        if self.uniform:
            return [self.total // self.layers] * self.layers
        steps, extra = divmod((self.total - self.least * self.layers) // self.step, self.layers)
        return [self.least + self.step * (steps + (index < extra)) for index in range(self.layers)]

    def splits(self, index: int, heads: int) -> list[tuple[int, int]]:
        """The pairs (K heads, V heads) that layer `index` may have when it has `heads` in all."""
        if self.fixed is not None:
            layer = self.fixed[index]
            if layer.k_heads is not None and layer.v_heads is not None:
                return [(layer.k_heads, layer.v_heads)]
        if self.uniform:
            return [(heads // 2, heads // 2)]
        return [(n, heads - n) for n in self.counts if heads - n in self.counts]

    def halves(self, index: int, heads: int) -> tuple[int, int]:
        """The one of `splits` with the most equal numbers."""
        return min(self.splits(index, heads), key=lambda pair: abs(pair[0] - pair[1]))

    def survey_shares(self) -> tuple[float, ...]:
        """Shares of a donor layer's heads at which a survey measures it."""
        numbers = list(range(self.least, self.most, self.step)) or [self.least]
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
        fixed = layer_heads(settings.plan, config, facts)
        total = sum(layer.kv_heads for layer in fixed)
        return HeadBudget(total, layers, whole, tuple(range(1, groups + 1)), 1, fixed=fixed)
    highest = min(settings.max_heads or groups, groups)
    counts = tuple(n for n in range(step, highest + 1, step) if n >= settings.min_heads)
    grouped = (groups, "KV") if settings.regroup is False else (facts.heads, "query")
    if settings.uniform:
        counts = tuple(n for n in counts if grouped[0] % n == 0)
    if not counts:
        raise BudgetError(
            f"no number of heads is a multiple of {step} from {settings.min_heads} to {highest}"
            + (" that divides the {} {} heads".format(*grouped) if settings.uniform else "")
            + f"; the donor has {groups} KV heads"
        )
    total = math.floor(settings.kv_budget * whole * layers + ROUNDING)
    if settings.uniform:
        fitting = [n for n in counts if 2 * n * layers <= total]
        if not fitting:
            raise _too_small(settings.kv_budget, counts, groups, "a uniform plan has")
        return HeadBudget(2 * fitting[-1] * layers, layers, whole, counts, step, uniform=True)
    if total < 2 * counts[0] * layers:
        raise _too_small(settings.kv_budget, counts, groups, "layers have")
    total = min(total, 2 * counts[-1] * layers)
    total -= (total - 2 * counts[0] * layers) % step
    return HeadBudget(total, layers, whole, counts, step)


def _too_small(budget: float, counts: tuple[int, ...], groups: int, who: str) -> BudgetError:
    """The error for a budget below the least of `counts`, with the nearest budgets that are possible."""
    shares = ", ".join(f"{math.ceil(1e4 * n / groups) / 1e4:g} ({n} of {groups})" for n in counts[:3])
    return BudgetError(
        f"kv_budget={budget} leaves fewer heads than {who} at least ({counts[0]} K and {counts[0]} V each); the "
        f"nearest that it can: {shares}"
    )


def layer_heads(plan: Sequence[dict[str, Any]], config: Any, facts: AttentionFacts) -> tuple[LayerHeads, ...]:
    """The layers of a user's plan, checked against the donor.

    Args:
        plan: for each layer {"kv_heads": 3}, {"k_heads": 2, "v_heads": 1} or {"k_map": […], "v_map": […]}, or several
            of these that agree.
    Raises:
        BudgetError: naming the layer and the number that does not fit.
    """
    if len(plan) != config.num_hidden_layers:
        raise BudgetError(f"the plan has {len(plan)} layers and the donor {config.num_hidden_layers}")
    return tuple(_layer_heads(f"plan, layer {index}", layer, facts) for index, layer in enumerate(plan))


def _layer_heads(place: str, layer: dict[str, Any], facts: AttentionFacts) -> LayerHeads:
    """One layer of a user's plan. Raises BudgetError, beginning with `place`, for what does not fit or agree."""
    forms = (("k_map", "v_map"), ("k_heads", "v_heads"), ("kv_heads",))
    given = next((form for form in forms if set(form) & layer.keys()), None)
    if given is None or not layer.keys() >= set(given):
        raise BudgetError(
            f"{place}: it needs k_map and v_map, or k_heads and v_heads, or kv_heads; it is {layer!r}"
        )
    if given == ("kv_heads",):
        return LayerHeads(_number(f"{place}: kv_heads", layer["kv_heads"], 2, 2 * facts.kv_heads))
    counts: list[int] = []
    maps: list[list[int] | None] = []
    for kind in "kv":
        number, head_map = layer.get(f"{kind}_heads"), layer.get(f"{kind}_map")
        if head_map is not None:
            _require_map(f"{place}, {kind}_map", head_map, facts)
            named = max(head_map) + 1
            if number not in (None, named):
                raise BudgetError(
                    f"{place}: {kind}_heads={number} and {kind}_map names {named}; change one of them"
                )
            number = named
        counts.append(_number(f"{place}: {kind}_heads", number, 1, facts.kv_heads))
        maps.append(head_map)
    if layer.get("kv_heads") not in (None, sum(counts)):
        raise BudgetError(
            f"{place}: kv_heads={layer['kv_heads']} and {sum(counts)} K and V heads; change one of them"
        )
    (k_heads, v_heads), (k_map, v_map) = counts, maps
    return LayerHeads(sum(counts), k_heads, v_heads, k_map, v_map)


def _number(what: str, number: Any, least: int, most: int) -> int:
    """`number`. Raises BudgetError, beginning with `what`, unless it is whole and from `least` to `most`."""
    if isinstance(number, bool) or not isinstance(number, int) or not least <= number <= most:
        raise BudgetError(f"{what}={number} is not a number from {least} to {most}, the donor's")
    return number


def _require_map(place: str, head_map: Any, facts: AttentionFacts) -> None:
    """Raises BudgetError unless the map numbers a fused head for every query head, without a gap."""
    whole = isinstance(head_map, list) and all(
        isinstance(n, int) and not isinstance(n, bool) for n in head_map
    )
    if not whole or len(head_map) != facts.heads:
        raise BudgetError(f"{place}: it needs a whole number for each of the {facts.heads} query heads")
    if sorted(set(head_map)) != list(range(len(set(head_map)))):
        raise BudgetError(f"{place}: {head_map} does not number its heads 0, 1, … without a gap")
