"""Budgets as numbers of heads: integer-exact, within limits, and plans that say them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mhconvert.convert.families.facts import attention_facts
from mhconvert.convert.methods.budget_division import LayerNeed
from mhconvert.convert.methods.dha.budget import head_budget
from mhconvert.convert.methods.dha.method import DHA
from mhconvert.convert.methods.dha.settings import DHASettings
from mhconvert.errors import BudgetError, UnsupportedError
from tests.donors import make_config


def budget(settings: DHASettings, heads: int = 8, kv_heads: int = 8, layers: int = 4) -> Any:
    config = make_config(heads=heads, kv_heads=kv_heads, layers=layers, hidden=16 * heads)
    return head_budget(config, settings, attention_facts(config))


@given(
    share=st.floats(0.01, 1),
    kv_heads=st.sampled_from([2, 3, 4, 8, 16]),
    layers=st.integers(1, 12),
    least=st.integers(1, 3),
    multiple=st.sampled_from([1, 2, 4]),
    needs=st.lists(st.floats(1e-4, 10), min_size=12, max_size=12),
)
def test_heads_of_all_layers_are_the_budget_and_never_more(
    share: float, kv_heads: int, layers: int, least: int, multiple: int, needs: list[float]
) -> None:
    """Check 11: the sum, the floor, and the multiple, before a survey and after it."""
    config = make_config(heads=kv_heads, kv_heads=kv_heads, layers=layers, hidden=16 * kv_heads)
    try:
        method = DHA(config, DHASettings(share, min_heads=least, head_multiple=multiple), "quick")
    except BudgetError:
        counts = [n for n in range(multiple, kv_heads + 1, multiple) if n >= least]
        assert not counts or 2 * counts[0] / (2 * kv_heads) > share - 1e-9
        return
    allowed = share * 2 * kv_heads * layers
    spread = list(method.heads)
    if method.divisible:
        shares = method.survey_shares
        found = [LayerNeed(shares, [n * (1.1 - s) for s in shares], shares[0], n) for n in needs[:layers]]
        method.share_out(found)
        assert sum(method.heads) == sum(spread)
    for heads in (spread, method.heads):
        assert allowed - multiple < sum(heads) <= allowed + 1e-6 or sum(heads) == method.budget.most * layers
        for index, number in enumerate(heads):
            pairs = method.budget.splits(index, number)
            assert pairs
            for pair in pairs:
                assert sum(pair) == number
                assert all(least <= n <= kv_heads and n % multiple == 0 for n in pair)


@pytest.mark.parametrize(("share", "heads"), [(2 / 3, 4), (0.6667, 4), (0.5, 3), (1.0, 6)])
def test_shares_that_are_whole_heads(share: float, heads: int) -> None:
    assert budget(DHASettings(share), 9, 3).spread() == [heads] * 4


def test_a_layer_that_needs_more_gets_more() -> None:
    method = DHA(make_config(heads=4, kv_heads=4, layers=3), DHASettings(0.5), "default")
    shares = method.survey_shares
    needs = [LayerNeed(shares, [1 - s for s in shares], shares[0], need) for need in (0.1, 5.0, 0.1)]
    method.share_out(needs)
    assert sum(method.heads) == 12
    assert method.heads[1] > max(method.heads[0], method.heads[2])


@pytest.mark.parametrize(
    ("settings", "kv_heads", "said"),
    [
        (DHASettings(0.05), 8, "the nearest that it can: 0.125 \\(1 of 8\\)"),
        (DHASettings(0.5, min_heads=5), 8, "at least \\(5 K and 5 V each\\)"),
        (DHASettings(0.5, min_heads=9), 8, "no number of heads"),
        (DHASettings(0.5, head_multiple=16), 8, "no number of heads is a multiple of 16"),
        (DHASettings(0.6, uniform=True, min_heads=5), 8, "uniform plan has at least \\(8 K"),
        (DHASettings(0.5), 1, "one KV head"),
    ],
)
def test_impossible_budgets_say_what_is_possible(settings: DHASettings, kv_heads: int, said: str) -> None:
    with pytest.raises(BudgetError, match=said):
        budget(settings, 8, kv_heads)


@pytest.mark.parametrize(
    ("choices", "said"),
    [
        ({"kv_budget": 0.0}, "outside"),
        ({"kv_budget": 1.5}, "outside"),
        ({"min_heads": 0}, "min_heads=0"),
        ({"head_multiple": True}, "head_multiple=True"),
        ({"min_heads": 3, "max_heads": 2}, "max_heads=2"),
        ({"uniform": True, "plan": [{"kv_heads": 2}]}, "leave out uniform or the plan"),
        ({"kv_budget": 0.4, "plan": [{"kv_heads": 2}]}, "leave out kv_budget"),
        ({"min_heads": 4, "plan": [{"kv_heads": 2}]}, "leave out min_heads"),
        ({"kv_budget": "half"}, "kv_budget='half' is not a number"),
        ({"kv_budget": True}, "kv_budget=True is not a number"),
        ({"uniform": "false"}, "uniform='false' is neither"),
        ({"regroup": "no"}, "regroup='no' is neither"),
        ({"min_heads": None}, "min_heads=None"),
        ({"plan": 5}, "plan is no list"),
        ({"fusion": "both"}, "not one of closed, trained"),
    ],
)
def test_settings_that_contradict_themselves(choices: dict[str, Any], said: str) -> None:
    with pytest.raises(BudgetError, match=said):
        DHASettings(**choices)


def test_a_uniform_plan_has_heads_that_divide_the_query_heads() -> None:
    found = budget(DHASettings(0.6, uniform=True), 9, 9)
    assert found.spread() == [6] * 4  # 3 of 9; 5 do not divide nine
    assert found.splits(0, 6) == [(3, 3)]
    assert not found.free


PLAN: dict[str, Any] = {
    "layers": [{"k_map": [0, 1, 0, 1], "v_map": [0, 0, 1, 2]}, {"k_heads": 1, "v_heads": 3}]
}


def planned(tmp_path: Path, plan: Any, **config: Any) -> Any:
    path = tmp_path / "plan.json"
    path.write_text(plan if isinstance(plan, str) else json.dumps(plan))
    config = {"heads": 4, "kv_heads": 4} | config
    return DHA(make_config(**config), DHASettings(plan=str(path)), "default")


def test_a_plan_fixes_heads_and_maps(tmp_path: Path) -> None:
    method = planned(tmp_path, PLAN)
    assert method.heads == [5, 4]
    assert [method.layer_sizes(i) for i in range(2)] == [
        {"k_heads": 2, "v_heads": 3},
        {"k_heads": 1, "v_heads": 3},
    ]
    assert method.kv_elements() == 9 * 16
    assert not method.divisible
    with pytest.raises(BudgetError, match="fixes the KV budget"):
        method.settings.at_budget(0.5)


@pytest.mark.parametrize(
    ("plan", "said"),
    [
        ("{", "is not JSON with"),
        ({"heads": []}, "is not JSON with"),
        ({"layers": 2}, "is no list of layers"),
        ({"layers": [PLAN["layers"][0], {"kv_heads": 1}]}, "layer 1: kv_heads=1 is not a number from 2 to 8"),
        ({"layers": PLAN["layers"][:1]}, "has 1 layers and the donor 2"),
        ({"layers": [PLAN["layers"][0], 3]}, "is no list of layers"),
        ({"layers": [PLAN["layers"][0], {"k_heads": 5, "v_heads": 1}]}, "layer 1: k_heads=5"),
        ({"layers": [PLAN["layers"][0], {"k_heads": 2}]}, "layer 1: it needs"),
        ({"layers": [PLAN["layers"][0], {"k_heads": 2, "v_heads": True}]}, "layer 1: v_heads=True"),
        (
            {"layers": [{"k_map": [0, 1], "v_map": [0, 0, 1, 2]}, PLAN["layers"][1]]},
            "layer 0, k_map: .* 4 query heads",
        ),
        (
            {"layers": [{"k_map": [0, 2, 0, 0], "v_map": [0, 0, 1, 2]}, PLAN["layers"][1]]},
            "layer 0, k_map: .* gap",
        ),
        ({"layers": [PLAN["layers"][0] | {"k_heads": 3}, PLAN["layers"][1]]}, "k_heads=3 and k_map names 2"),
        (
            {"layers": [{"kv_heads": 2, "k_heads": 3, "v_heads": 4}, PLAN["layers"][1]]},
            "layer 0: kv_heads=2 and 7 K and V heads",
        ),
        (
            {"layers": [{"k_map": [0, 1, 2, 10**9], "v_map": [0, 0, 1, 2]}, PLAN["layers"][1]]},
            "layer 0, k_map: .* gap",
        ),
        ({"layers": [{"k_map": [0, 1, 0, 1], "v_heads": 1}, PLAN["layers"][1]]}, "layer 0: it needs"),
    ],
)
def test_a_plan_that_does_not_fit_names_layer_and_number(tmp_path: Path, plan: Any, said: str) -> None:
    with pytest.raises(BudgetError, match=said):
        planned(tmp_path, plan)


def test_a_plan_that_is_not_there() -> None:
    with pytest.raises(BudgetError, match=r"plan nowhere\.json cannot be read: No such file"):
        DHASettings(plan="nowhere.json")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"kv_budget": 0.5},
            r"\(4 K and 1 V each; .*not fused\); .*: 0.625 \(4 K and 1 V\), 0.75 \(4 K and 2 V\)",
        ),
        ({"kv_budget": 0.75, "max_heads": 2}, "its 4 K heads stay as they are, which max_heads=2"),
        ({"kv_budget": 0.75, "head_multiple": 3}, "its 4 K heads stay as they are, which head_multiple=3"),
        ({"plan": [{"kv_heads": 4}] * 2}, "layer 0: kv_heads=4 is not a number from 5 to 8"),
        ({"plan": [{"k_heads": 4, "v_heads": 1}, {"k_heads": 3, "v_heads": 1}]}, "layer 1: .*k_heads: 4"),
        ({"plan": [{"k_map": [0, 1, 3, 2], "v_map": [0] * 4}] * 2}, r"k_map: \[0, 1, 2, 3\]"),
    ],
)
def test_normed_keys_are_not_fused_and_what_would_is_refused(
    tmp_path: Path, settings: dict[str, Any], said: str
) -> None:
    if "plan" in settings:
        file = tmp_path / "plan.json"
        file.write_text(json.dumps({"layers": settings["plan"]}))
        settings = {"plan": str(file)}
    config = make_config(family="qwen3", heads=4, kv_heads=4)
    with pytest.raises(BudgetError, match=said):
        head_budget(config, DHASettings(**settings), attention_facts(config))


@pytest.mark.parametrize("family", ["qwen3", "gemma3_text", "olmo2"])
def test_a_uniform_plan_of_a_donor_with_normed_keys_is_refused(family: str) -> None:
    with pytest.raises(UnsupportedError, match="divided by their RMS"):
        DHA(make_config(family=family), DHASettings(uniform=True), "default")


@given(share=st.floats(0.5, 1), kv_heads=st.sampled_from([2, 3, 4, 8]), layers=st.integers(1, 6))
def test_budgets_of_normed_keys_count_every_k_head(share: float, kv_heads: int, layers: int) -> None:
    config = make_config(
        family="qwen3", heads=kv_heads, kv_heads=kv_heads, layers=layers, hidden=16 * kv_heads
    )
    least = (kv_heads + 1) / (2 * kv_heads)
    try:
        found = head_budget(config, DHASettings(share), attention_facts(config))
    except BudgetError:
        assert share < least
        return
    assert share >= least - 1e-9
    heads = found.spread()
    assert sum(heads) == int(share * 2 * kv_heads * layers + 1e-9)
    assert [found.splits(index, count) for index, count in enumerate(heads)] == [
        [(kv_heads, count - kv_heads)] for count in heads
    ]


@given(
    share=st.floats(0.05, 1),
    heads=st.sampled_from([(4, 2), (8, 8), (9, 3), (12, 4), (32, 8)]),
    layers=st.integers(1, 8),
    multiple=st.sampled_from([1, 2]),
    needs=st.lists(st.floats(1e-4, 10), min_size=8, max_size=8),
)
def test_equal_heads_are_equal_and_divide_the_query_heads(
    share: float, heads: tuple[int, int], layers: int, multiple: int, needs: list[float]
) -> None:
    config = make_config(heads=heads[0], kv_heads=heads[1], layers=layers, hidden=16 * heads[0])
    try:
        method = DHA(config, DHASettings(share, equal_heads=True, head_multiple=multiple), "quick")
    except BudgetError:
        return
    spread = list(method.heads)
    if method.divisible:
        shares = method.survey_shares
        free = [(s, 1 - s) for s in shares]
        method.share_out(
            [LayerNeed(shares, [1.1 - s for s in shares], shares[0], n, free) for n in needs[:layers]]
        )
        cost = method.totals()["equal_heads_cost"]
        assert cost["heads"]["equal_heads"] == sum(method.heads) <= cost["heads"]["free"]
        assert cost["predicted_kl"]["free"] < cost["predicted_kl"]["equal_heads"]
        assert "as many K as V heads in every layer: the survey predicts a KL of" in method.notice
    for chosen in (spread, method.heads):
        assert sum(chosen) <= share * 2 * heads[1] * layers + 1e-6
        for index, number in enumerate(chosen):
            [(k_heads, v_heads)] = method.budget.splits(index, number)
            assert k_heads == v_heads == number / 2 <= heads[1]
            assert heads[0] % k_heads == 0
            assert k_heads % multiple == 0


def test_equal_heads_go_where_they_are_needed() -> None:
    method = DHA(make_config(heads=8, kv_heads=8, layers=4), DHASettings(0.5, equal_heads=True), "default")
    assert method.heads == [8] * 4
    shares = method.survey_shares
    assert shares == (1 / 8, 2 / 8, 4 / 8, 1.0)  # the whole too: nothing is extrapolated
    needs = [LayerNeed(shares, [2.0 ** (-8 * s) for s in shares], shares[0], n) for n in (0.1, 0.1, 5.0, 0.1)]
    method.share_out(needs)
    assert method.heads == [4, 4, 16, 8] or sorted(method.heads) == [4, 4, 8, 16]
    assert method.heads[2] == 16
    assert method.layer_sizes(2) == {"kv_heads": 16}
    assert method.totals() == {}  # the survey measured no free plan
    assert DHA(make_config(heads=8, kv_heads=8), DHASettings(0.5), "default").unconstrained is None


def test_equal_heads_of_two_levels_use_the_budget() -> None:
    """SmolLM2's shape: three KV heads are read by nine query heads in groups of one size or as they are."""
    config = make_config(heads=9, kv_heads=3, layers=4, hidden=144)
    method = DHA(config, DHASettings(2 / 3, equal_heads=True), "default")
    assert method.survey_shares == (1 / 3, 1.0)
    method.share_out([LayerNeed((1 / 3, 1.0), (0.4, 0.0), 1 / 3, n) for n in (0.1, 0.3, 0.2, 0.1)])
    assert method.heads == [2, 6, 6, 2]


def test_a_plan_of_equal_heads() -> None:
    config = make_config(heads=4, kv_heads=4)
    same = [0, 1, 1, 0]
    plan: list[dict[str, Any]] = [{"kv_heads": 4}, {"k_map": same, "v_map": same}]
    method = DHA(config, DHASettings(plan=plan, equal_heads=True), "default")
    assert [method.budget.splits(i, 4) for i in range(2)] == [[(2, 2)]] * 2
    assert method.unconstrained is None


@pytest.mark.parametrize(
    ("layer", "said"),
    [
        ({"kv_heads": 3}, "plan, layer 0: kv_heads=3, and equal_heads takes as many K as V heads"),
        ({"k_heads": 3, "v_heads": 1}, "plan, layer 0: 3 K and 1 V heads, and equal_heads"),
        (
            {"kv_heads": 6},
            "3 K and 3 V heads cannot be read by equal groups of 4 heads; choose kv_heads of 2, 4, 8",
        ),
        ({"k_map": [0, 0, 1, 1], "v_map": [0, 1, 1, 0]}, "takes a k_map and v_map that are the same groups"),
        ({"k_map": [0, 0, 0, 1], "v_map": [0, 0, 0, 1]}, "the same groups of one size"),
    ],
)
def test_a_plan_that_equal_heads_cannot_have(layer: dict[str, Any], said: str) -> None:
    with pytest.raises(BudgetError, match=said):
        DHA(make_config(heads=4, kv_heads=4), DHASettings(plan=[layer] * 2, equal_heads=True), "default")


def test_equal_heads_exclude_and_are_refused() -> None:
    with pytest.raises(BudgetError, match="leave out equal_heads or uniform"):
        DHASettings(uniform=True, equal_heads=True)
    with pytest.raises(UnsupportedError, match="a plan with equal_heads fuses K heads too"):
        DHA(make_config(family="qwen3"), DHASettings(equal_heads=True), "default")
