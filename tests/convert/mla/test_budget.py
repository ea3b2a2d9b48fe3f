"""The arithmetic of a budget: whole numbers that add up, and refusals that say what is possible."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mhconvert.convert.errors import BudgetError
from mhconvert.convert.mla.budget import ROPE_SHARES, LayerBudget, check_series, layer_budget
from mhconvert.convert.mla.settings import MLASettings, Profile
from tests.donors import make_config

quick = settings(max_examples=200, deadline=None, derandomize=True)
kv_heads = st.sampled_from([1, 2, 3, 4, 5, 8, 16, 32, 64])
head_dims = st.sampled_from([8, 16, 64, 80, 96, 128])
budgets = st.floats(0.001, 1)
efforts = st.sampled_from(sorted(ROPE_SHARES))


def geometry(groups: int, head_dim: int) -> Any:
    return make_config(heads=groups, kv_heads=groups, hidden=8 * groups, head_dim=head_dim)


@pytest.mark.parametrize(
    ("groups", "head_dim", "share", "elements"),
    [
        (3, 64, 0.3125, 120),
        (3, 64, 0.5, 192),
        (8, 128, 0.0703125, 144),
        (8, 128, 1.0, 2048),
        (1, 64, 0.33, 42),
    ],
)
def test_the_budget_is_a_whole_number_of_elements(
    groups: int, head_dim: int, share: float, elements: int
) -> None:
    budget = layer_budget(geometry(groups, head_dim), MLASettings(kv_budget=share))
    assert budget.elements == elements
    assert budget.donor_elements == 2 * groups * head_dim
    assert (budget.kv_lora_rank, budget.qk_rope_head_dim) == (None, None)
    assert budget.all_components == groups * head_dim // 2


@quick
@given(kv_heads, head_dims, budgets, efforts)
def test_every_choice_fits_the_layer(groups: int, head_dim: int, share: float, effort: str) -> None:
    assume(round(share * 2 * groups * head_dim) >= 3)
    budget = layer_budget(geometry(groups, head_dim), MLASettings(kv_budget=share))
    choices = budget.component_choices(effort)
    assert choices == sorted(set(choices))
    assert len(choices) >= 1
    for count in choices:
        rank = budget.elements - 2 * count
        assert 1 <= count <= budget.all_components
        assert 1 <= rank <= budget.donor_elements - 2 * count  # no wider than what the latent holds


@quick
@given(kv_heads, head_dims, efforts)
def test_the_whole_budget_keeps_every_component(groups: int, head_dim: int, effort: str) -> None:
    budget = layer_budget(geometry(groups, head_dim), MLASettings(kv_budget=1.0))
    assert budget.component_choices(effort) == [budget.all_components]


@quick
@given(kv_heads, head_dims, budgets)
def test_a_portable_split_is_one_series(groups: int, head_dim: int, share: float) -> None:
    assume(round(share * 2 * groups * head_dim) >= 6)
    budget = layer_budget(geometry(groups, head_dim), MLASettings(kv_budget=share, profile="portable"))
    rope, rank = budget.qk_rope_head_dim, budget.kv_lora_rank
    assert rope is not None
    assert rank is not None
    assert rope % 2 == 0
    assert 2 <= rope <= head_dim
    assert rank >= 1
    assert rank + rope == budget.elements == round(share * 2 * groups * head_dim)
    assert budget.component_choices("quick") == [rope // 2]
    check_series(budget)


@quick
@given(kv_heads, head_dims, st.sampled_from(["quality", "portable"]))
def test_a_refusal_names_a_budget_that_is_possible(groups: int, head_dim: int, profile: Profile) -> None:
    donor = 2 * groups * head_dim
    with pytest.raises(BudgetError, match=rf"leaves 1 of the donor's {donor} KV elements") as caught:
        layer_budget(geometry(groups, head_dim), MLASettings(kv_budget=1 / donor, profile=profile))
    lowest = float(str(caught.value).rsplit("between ", 1)[1].split(" and")[0])
    assert (
        layer_budget(geometry(groups, head_dim), MLASettings(kv_budget=lowest, profile=profile)).elements >= 3
    )


@pytest.mark.parametrize(("rank", "rope"), [(1, 2), (88, 32), (64, 192), (192, 192), (382, 2)])
def test_explicit_sizes_are_taken_as_they_are(rank: int, rope: int) -> None:
    budget = layer_budget(geometry(3, 64), MLASettings(kv_lora_rank=rank, qk_rope_head_dim=rope))
    assert budget == LayerBudget(rank + rope, rank, rope, 384, 32, 3)
    assert budget.component_choices("default") == [rope // 2]


@pytest.mark.parametrize("rope", [0, -2, 1, 7, 194])
def test_a_rotary_key_that_the_donor_cannot_have(rope: int) -> None:
    message = rf"qk_rope_head_dim={rope} must be even and between 2 and num_key_value_heads·head_dim = 192"
    with pytest.raises(BudgetError, match=message):
        layer_budget(geometry(3, 64), MLASettings(kv_lora_rank=8, qk_rope_head_dim=rope))


@pytest.mark.parametrize("rank", [0, -1, 353])
def test_a_rank_that_is_out_of_range(rank: int) -> None:
    message = rf"kv_lora_rank={rank} is outside 1 … 2·num_key_value_heads·head_dim − qk_rope_head_dim = 352"
    with pytest.raises(BudgetError, match=message):
        layer_budget(geometry(3, 64), MLASettings(kv_lora_rank=rank, qk_rope_head_dim=32))


def test_a_series_holds_each_frequency_once() -> None:
    wide = layer_budget(geometry(3, 64), MLASettings(kv_lora_rank=8, qk_rope_head_dim=66))
    with pytest.raises(BudgetError, match=r"qk_rope_head_dim=66 exceeds head_dim = 64.*--profile quality"):
        check_series(wide)
    check_series(layer_budget(geometry(3, 64), MLASettings(kv_lora_rank=8, qk_rope_head_dim=64)))
