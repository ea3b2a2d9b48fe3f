"""The arithmetic of a budget: whole numbers that add up, and refusals that say what is possible."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mhconvert.convert.methods.mla.budget import KERNEL_SHAPES, ROPE_SHARES, LayerBudget, layer_budget
from mhconvert.convert.methods.mla.engine_rows import ROWS
from mhconvert.convert.methods.mla.settings import MLASettings, Profile
from mhconvert.errors import BudgetError, UnsupportedError
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
    budget = layer_budget(geometry(groups, head_dim), MLASettings(kv_budget=share, kv_bits="16"))
    assert budget.elements == elements
    assert budget.donor_elements == 2 * groups * head_dim
    assert (budget.kv_lora_rank, budget.qk_rope_head_dim) == (None, None)
    assert budget.all_components == groups * head_dim // 2


@quick
@given(kv_heads, head_dims, budgets, efforts)
def test_every_choice_fits_the_layer(groups: int, head_dim: int, share: float, effort: str) -> None:
    assume(round(share * 2 * groups * head_dim) >= 3)
    budget = layer_budget(geometry(groups, head_dim), MLASettings(kv_budget=share, kv_bits="16"))
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
    budget = layer_budget(geometry(groups, head_dim), MLASettings(kv_budget=1.0, kv_bits="16"))
    assert budget.component_choices(effort) == [budget.all_components]


@quick
@given(kv_heads, st.sampled_from([64, 128, 192]), budgets)
def test_a_portable_split_is_what_kernels_accept(groups: int, head_dim: int, share: float) -> None:
    elements = round(share * 2 * groups * head_dim)
    assume(elements > 64)
    budget = layer_budget(geometry(groups, head_dim), MLASettings(kv_budget=share, profile="portable"))
    assert budget.qk_rope_head_dim == 64
    assert budget.kv_lora_rank == budget.elements - 64
    rows = [row for row in ROWS if elements / 2 <= row <= elements < 2 * groups * head_dim]
    assert budget.elements == max(rows, default=elements)
    assert (budget.notice == "") == (budget.elements == elements and elements in ROWS)
    assert budget.component_choices("quick") == [32]  # no more than one for each of the donor's frequencies
    assert any((head_dim, 64) == shape[:2] and shape[2] >= head_dim for shape in KERNEL_SHAPES)


def portable(groups: int, head_dim: int, **choices: Any) -> LayerBudget:
    return layer_budget(geometry(groups, head_dim), MLASettings(profile="portable", **choices))


def test_a_portable_row_is_one_that_vllm_takes_and_the_plan_says_where_it_is_none() -> None:
    """Llama-3-8B, Llama-3.2-1B and SmolLM2 in their shapes, and a donor of many KV heads."""
    assert portable(8, 128, kv_budget=0.28125).kv_lora_rank == 512
    assert portable(8, 64).kv_lora_rank == 512 - 64
    half = portable(8, 128)
    assert (half.kv_lora_rank, half.qk_rope_head_dim) == (512, 64)
    assert half.notice == (
        "the budget allows 1024 elements a token and layer, and vLLM 0.32 takes 320, 512 or 576: the result has a "
        "row of 576 elements (kv_lora_rank 512 + qk_rope_head_dim 64); --kv-lora-rank 960 --qk-rope-head-dim 64 uses "
        "all of it, for the other engines"
    )
    small = portable(3, 64)
    assert (small.elements, small.kv_lora_rank) == (192, 128)
    assert small.notice == (
        "vLLM 0.32 takes latent rows of 320, 512 or 576 elements and not a row of 192 elements (kv_lora_rank 128 + "
        "qk_rope_head_dim 64): llama.cpp, transformers and, by its source, SGLang remain; a --kv-budget of 0.8334 "
        "(320) makes one that it takes and `export --pad-row 320` widens it with zeros"
    )
    assert portable(3, 64, kv_budget=0.9).elements == 320
    assert portable(3, 64, kv_budget=1.0).elements == 384  # nothing is to be saved
    wide = portable(32, 128)
    assert wide.elements == 4096  # 576 would be a seventh of what was asked for
    assert "0.0391 (320) or 0.0625 (512) or 0.0704 (576) makes one" in wide.notice
    assert "--pad-row" not in wide.notice
    assert portable(2, 64).notice.endswith(
        "`export --pad-row 320` widens it with zeros, more than the donor's own 256"
    )
    explicit = portable(8, 128, kv_lora_rank=600, qk_rope_head_dim=64)
    assert explicit.elements == 664
    assert "not a row of 664 elements" in explicit.notice
    assert portable(8, 128, kv_lora_rank=256, qk_rope_head_dim=64).notice == ""
    assert layer_budget(geometry(8, 128), MLASettings(kv_budget=0.5, kv_bits="16")).notice == ""


@pytest.mark.parametrize("head_dim", [8, 16, 80, 96, 256])
def test_a_head_without_a_kernel_is_refused(head_dim: int) -> None:
    message = (
        rf"--profile portable cannot express head_dim={head_dim}: .*\(64, 64, 128\).*use --profile quality"
    )
    for choice in ({"kv_budget": 0.5}, {"kv_lora_rank": 8, "qk_rope_head_dim": 8}):
        with pytest.raises(UnsupportedError, match=message):
            layer_budget(geometry(4, head_dim), MLASettings(**choice, profile="portable"))  # type: ignore[arg-type]


def test_the_nearest_portable_budgets_are_listed() -> None:
    with pytest.raises(BudgetError) as caught:
        layer_budget(geometry(3, 64), MLASettings(kv_budget=0.125, profile="portable"))
    assert str(caught.value) == (
        "kv_budget=0.125 leaves 48 of the donor's 384 KV elements per token and layer, and --profile portable needs "
        "65 (a rotary key of 64 and a latent); the nearest that it can: 0.1693 (65 elements), 0.2084 (80 elements), "
        "0.25 (96 elements)"
    )


@quick
@given(kv_heads, st.sampled_from([64, 128]), st.sampled_from(["quality", "portable"]))
def test_a_refusal_names_budgets_that_are_possible(groups: int, head_dim: int, profile: Profile) -> None:
    donor = 2 * groups * head_dim
    with pytest.raises(BudgetError, match=rf"leaves 1 of the donor's {donor} KV elements") as caught:
        layer_budget(
            geometry(groups, head_dim), MLASettings(kv_budget=1 / donor, profile=profile, kv_bits="16")
        )
    listed = str(caught.value).rsplit("it can: ", 1)[1]
    found = re.findall(r"([\d.]+) \((\d+) elements\)", listed)
    assert len(found) == 3
    for share, elements in found:
        budget = layer_budget(
            geometry(groups, head_dim), MLASettings(kv_budget=float(share), profile=profile, kv_bits="16")
        )
        assert budget.elements == int(elements)


@pytest.mark.parametrize(("rank", "rope"), [(1, 2), (88, 32), (64, 192), (192, 192), (382, 2)])
def test_explicit_sizes_are_taken_as_they_are(rank: int, rope: int) -> None:
    budget = layer_budget(geometry(3, 64), MLASettings(kv_lora_rank=rank, qk_rope_head_dim=rope))
    assert budget == LayerBudget(rank + rope, rank, rope, 384, 32, 3)
    assert budget.component_choices("default") == [rope // 2]


@pytest.mark.parametrize("rope", [7, 194])
def test_a_rotary_key_that_the_donor_cannot_have(rope: int) -> None:
    message = rf"qk_rope_head_dim={rope} must be even and between 2 and num_key_value_heads·head_dim = 192"
    with pytest.raises(BudgetError, match=message):
        layer_budget(geometry(3, 64), MLASettings(kv_lora_rank=8, qk_rope_head_dim=rope))


@pytest.mark.parametrize(("name", "least"), [("kv_lora_rank", 1), ("qk_rope_head_dim", 2)])
def test_widths_that_no_donor_can_have(name: str, least: int) -> None:
    widths = {"kv_lora_rank": 8, "qk_rope_head_dim": 2}
    for wrong in (least - 1, -2):
        with pytest.raises(BudgetError, match=f"{name}={wrong} is too small; use at least {least}"):
            MLASettings(**(widths | {name: wrong}))


def test_a_rank_that_the_donor_cannot_have() -> None:
    message = r"kv_lora_rank=353 is outside 1 … 2·num_key_value_heads·head_dim − qk_rope_head_dim = 352"
    with pytest.raises(BudgetError, match=message):
        layer_budget(geometry(3, 64), MLASettings(kv_lora_rank=353, qk_rope_head_dim=32))


def test_an_explicit_rotary_key_that_no_kernel_accepts() -> None:
    message = r"qk_rope_head_dim=32 has no kernel at head_dim=64: --profile portable needs 64"
    with pytest.raises(BudgetError, match=message):
        layer_budget(geometry(3, 64), MLASettings(kv_lora_rank=8, qk_rope_head_dim=32, profile="portable"))
    settings = MLASettings(kv_lora_rank=8, qk_rope_head_dim=64, profile="portable")
    assert layer_budget(geometry(3, 64), settings).elements == 72
