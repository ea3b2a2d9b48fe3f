"""The layers of a user's plan, checked against the donor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from mhconvert.errors import BudgetError

from ...families.facts import AttentionFacts


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
        least = facts.kv_heads + 1 if facts.qk_norm else 2
        return LayerHeads(_number(f"{place}: kv_heads", layer["kv_heads"], least, 2 * facts.kv_heads))
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
    if facts.qk_norm and (k_heads < facts.kv_heads or k_map not in (None, facts.head_map)):
        raise BudgetError(
            f"{place}: the donor's keys are divided by their RMS, so its {facts.kv_heads} K heads stay as they are "
            f"(k_heads: {facts.kv_heads}, k_map: {facts.head_map})"
        )
    return LayerHeads(sum(counts), k_heads, v_heads, k_map, v_map)


def equal_layers(layers: Sequence[LayerHeads], heads: int) -> tuple[LayerHeads, ...]:
    """The layers of a plan as ones that have as many K as V heads, both read by the same groups of one size.

    Args:
        heads: of which groups are made: query heads, or the KV heads whose readers stay together.
    Raises:
        BudgetError: naming the layer that cannot be one, and what it could have.
    """
    return tuple(_equal(f"plan, layer {index}", layer, heads) for index, layer in enumerate(layers))


def _equal(place: str, layer: LayerHeads, heads: int) -> LayerHeads:
    half = layer.kv_heads // 2
    if layer.kv_heads % 2 or layer.k_heads not in (None, half) or layer.v_heads not in (None, half):
        named = (
            f"{layer.k_heads} K and {layer.v_heads} V heads"
            if layer.k_heads
            else f"kv_heads={layer.kv_heads}"
        )
        raise BudgetError(f"{place}: {named}, and equal_heads takes as many K as V heads in a layer")
    if heads % half:
        possible = ", ".join(str(2 * n) for n in range(1, heads + 1) if heads % n == 0)
        raise BudgetError(
            f"{place}: {half} K and {half} V heads cannot be read by equal groups of {heads} heads; choose "
            f"kv_heads of {possible}"
        )
    sizes = {layer.k_map.count(n) for n in layer.k_map} if layer.k_map is not None else set()
    if layer.k_map != layer.v_map or len(sizes) > 1:
        raise BudgetError(
            f"{place}: equal_heads takes a k_map and v_map that are the same groups of one size"
        )
    return replace(layer, k_heads=half, v_heads=half)


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
