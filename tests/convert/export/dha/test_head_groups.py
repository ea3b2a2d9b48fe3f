"""A group plan is the layer that it is made of; a layer that has none is refused for a true reason."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mhconvert.convert.export.dha.head_groups import group, largest_group, plan_layers, regrouped
from mhconvert.errors import ExportError

WIDTH, TOKENS, HIDDEN = 2, 3, 5

quick = settings(max_examples=100, deadline=None, derandomize=True)


@st.composite
def head_maps(draw: st.DrawFn, heads: int | None = None) -> tuple[list[int], list[int]]:
    """Two maps of one to twelve query heads, each with heads numbered without a gap."""
    heads = heads or draw(st.integers(1, 12))
    found = []
    for _ in "kv":
        labels = draw(
            st.lists(st.integers(0, draw(st.integers(0, heads - 1))), min_size=heads, max_size=heads)
        )
        names = draw(st.permutations(sorted(set(labels))))
        found.append([names.index(label) for label in labels])
    return found[0], found[1]


@st.composite
def equal_groups(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    """Maps of one partition into equal groups, in any order and by any numbers."""
    groups, size = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    labels = draw(st.permutations([n for n in range(groups) for _ in range(size)]))
    v_names = draw(st.permutations(range(groups)))
    return list(labels), [v_names[label] for label in labels]


def random_layer(maps: tuple[list[int], list[int]], seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rows = {"q_proj": len(maps[0]), "k_proj": max(maps[0]) + 1, "v_proj": max(maps[1]) + 1}
    layer = {}
    for name, heads in rows.items():
        layer[f"{name}.weight"] = torch.randn(heads * WIDTH, HIDDEN, generator=generator, dtype=torch.float64)
        layer[f"{name}.bias"] = torch.randn(heads * WIDTH, generator=generator, dtype=torch.float64)
    layer["o_proj.weight"] = torch.randn(
        HIDDEN, rows["q_proj"] * WIDTH, generator=generator, dtype=torch.float64
    )
    layer["o_proj.bias"] = torch.randn(HIDDEN, generator=generator, dtype=torch.float64)
    return layer


def attend(layer: dict[str, Tensor], k_map: list[int], v_map: list[int], x: Tensor) -> Tensor:
    """Query head h reads K head k_map[h] and V head v_map[h]; (TOKENS, HIDDEN) -> the same."""
    q, k, v = (
        (x @ layer[f"{name}.weight"].T + layer[f"{name}.bias"]).unflatten(1, (-1, WIDTH))
        for name in ("q_proj", "k_proj", "v_proj")
    )
    outputs = [(q[:, h] @ k[:, k_map[h]].T).softmax(-1) @ v[:, v_map[h]] for h in range(len(k_map))]
    return torch.cat(outputs, dim=1) @ layer["o_proj.weight"].T + layer["o_proj.bias"]


def regrouped_output(maps: tuple[list[int], list[int]], size: int) -> tuple[Tensor, Tensor]:
    layer, x = random_layer(maps), torch.randn(TOKENS, HIDDEN, dtype=torch.float64)
    plan = group(maps, size)
    stock = [head // size for head in range(len(maps[0]))]  # what grouped-query attention does
    return attend(regrouped(layer, plan, WIDTH), stock, stock, x), attend(layer, *maps, x)


@quick
@given(head_maps())
def test_the_regrouped_layer_computes_the_same_at_every_size(maps: tuple[list[int], list[int]]) -> None:
    largest = largest_group(maps)
    for size in (s for s in range(1, largest + 1) if largest % s == 0):
        found, expected = regrouped_output(maps, size)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@quick
@given(equal_groups())
def test_equal_groups_need_no_copies(maps: tuple[list[int], list[int]]) -> None:
    (plan,) = plan_layers([maps], uniform=True, duplicate=False, head_bytes=1, donor_heads=8, way_out="")
    assert (plan.duplicated, plan.groups) == (0, max(maps[0]) + 1)
    assert sorted(plan.order) == list(range(len(maps[0])))
    assert sorted(plan.k_heads) == sorted(plan.v_heads) == list(range(plan.groups))


@quick
@given(head_maps())
def test_a_refusal_is_right(maps: tuple[list[int], list[int]]) -> None:
    """Without copies as many K as V heads are cached, each read by the same query heads, in groups of one size."""
    partitions = [
        {frozenset(h for h, n in enumerate(head_map) if n == one) for one in head_map} for head_map in maps
    ]
    possible = partitions[0] == partitions[1] and len({len(heads) for heads in partitions[0]}) == 1
    try:
        plan_layers([maps], uniform=False, duplicate=False, head_bytes=1, donor_heads=8, way_out="")
        refused = False
    except ExportError:
        refused = True
    assert refused is not possible


@quick
@given(head_maps())
def test_copies_are_as_few_as_can_be(maps: tuple[list[int], list[int]]) -> None:
    """Of all sizes of groups, the largest at which no group reads two heads."""
    heads = len(maps[0])
    counts = [list(zip(*maps, strict=True)).count(pair) for pair in set(zip(*maps, strict=True))]
    fewest = min(heads // size for size in range(1, heads + 1) if all(count % size == 0 for count in counts))
    (plan,) = plan_layers([maps], uniform=False, duplicate=True, head_bytes=1, donor_heads=8, way_out="")
    assert plan.groups == fewest
    assert plan.duplicated == 2 * fewest - len(set(maps[0])) - len(set(maps[1]))
    assert plan.group_size * plan.groups == heads


@quick
@given(st.lists(head_maps(heads=6), min_size=1, max_size=4))
def test_a_uniform_plan_has_one_number_of_heads(layers: list[tuple[list[int], list[int]]]) -> None:
    plans = plan_layers(layers, uniform=True, duplicate=True, head_bytes=1, donor_heads=8, way_out="")
    apart = plan_layers(layers, uniform=False, duplicate=True, head_bytes=1, donor_heads=8, way_out="")
    assert len({plan.groups for plan in plans}) == 1
    assert plans[0].group_size == math.gcd(*(plan.group_size for plan in apart))
    for maps, plan in zip(layers, plans, strict=True):
        found, expected = regrouped_output(maps, plan.group_size)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_a_layer_in_order_stays_as_it_is() -> None:
    plan = group(([0, 0, 1, 1], [0, 0, 1, 1]), 2)
    assert (plan.order, plan.k_heads, plan.v_heads) == ((0, 1, 2, 3), (0, 1), (0, 1))


@pytest.mark.parametrize(
    ("layers", "uniform", "said"),
    [
        (
            [([0, 0, 1, 1], [0, 0, 1, 1]), ([0, 0, 1, 1], [0, 0, 0, 0])],
            False,
            r"layer 1: its 4 query heads read 2 K and 1 V heads in 2 pairs, by groups of 2, 2; .*--duplicate caches 1 "
            r"heads, all layers together, more than once: 70 -> 80 KV bytes per token \(the donor: 160\); or "
            r"serve it as it is",
        ),
        (
            [([0, 0, 0, 1], [0, 0, 0, 1])],
            False,
            r"layer 0: its 4 query heads read 2 K and 2 V heads in 2 pairs, by groups of 3, 1; .* caches 4 heads.*: "
            r"40 -> 80 KV bytes",
        ),
        (
            [([0, 0, 0, 0], [0, 0, 0, 0]), ([0, 0, 1, 1], [0, 0, 1, 1])],
            True,
            r"layer 0: it has 1 KV head, and other layers force groups of 2 query heads, which are 2; .* caches 2 "
            r"heads.*: 60 -> 80 KV bytes per token \(the donor: 160\); or serve it as it is",
        ),
    ],
)
def test_refusals_say_what_it_would_cost(
    layers: list[tuple[list[int], list[int]]], uniform: bool, said: str
) -> None:
    way_out = "or serve it as it is"
    with pytest.raises(ExportError, match=said):
        plan_layers(layers, uniform=uniform, duplicate=False, head_bytes=10, donor_heads=8, way_out=way_out)
