"""The budget as full layers, and every setting that cannot be had."""

from __future__ import annotations

from typing import Any

import pytest

from mhconvert.convert.calibration.calibration_rows import judged_tokens, row_length
from mhconvert.convert.methods.budget_division import LayerNeed
from mhconvert.convert.methods.swa.first_tokens import FIRST
from mhconvert.convert.methods.swa.method import SWA
from mhconvert.convert.methods.swa.settings import SWASettings
from mhconvert.convert.methods.swa.window_plan import DEFAULT_WINDOW, LONGEST_CONTEXT, window_plan
from mhconvert.convert.recipe.recipe import Recipe
from mhconvert.errors import BudgetError
from tests.donors import make_config

LAYERS = 8


def config(**changes: Any) -> Any:
    return make_config(**{"layers": LAYERS, "max_position_embeddings": 8192} | changes)


def plan(settings: SWASettings, **changes: Any) -> Any:
    return window_plan(config(**changes), settings)


def test_defaults_come_from_what_the_donor_reads() -> None:
    assert (plan(SWASettings()).context, plan(SWASettings()).window) == (8192, 1024)
    short = plan(SWASettings(), max_position_embeddings=512)
    assert (short.context, short.window) == (512, 64)
    assert plan(SWASettings(), max_position_embeddings=8).window == 2
    long = plan(SWASettings(), max_position_embeddings=131072)
    assert (long.context, long.window) == (LONGEST_CONTEXT, DEFAULT_WINDOW)


@pytest.mark.parametrize("budget", [0.125, 0.13, 0.3, 0.5, 0.5625, 0.99, 1.0])
def test_as_many_layers_are_full_as_the_budget_pays_for(budget: float) -> None:
    found = plan(SWASettings(kv_budget=budget))
    share = found.share(found.windows(found.spread()))
    assert share <= budget + 1e-9
    assert found.full == LAYERS or share + (1 - 1024 / 8192) / LAYERS > budget + 1e-9
    assert len(found.spread()) == found.full


def test_layers_are_full_whose_windowing_costs_most() -> None:
    method = SWA(config(), SWASettings(kv_budget=0.5625), "quick")
    costs = [0.1, 0.5, 0.2, 0.9, 0.05, 0.3, 0.01, 0.4]
    least = method.plan.least_share
    assert method.survey_shares == (least,)
    assert method.layer_sizes(0) == {}
    method.share_out([LayerNeed((least,), (0.1,), least, cost) for cost in costs])
    assert [i for i, window in enumerate(method.windows) if window is None] == [1, 3, 5, 7]
    full = {
        "kind": "full",
        "kv_share": 1.0,
        "costs": {"windowed": 0.5},
        "window": None,
        "cached_tokens": 8192,
    }
    assert method.layer_sizes(1) == full
    windowed = {"kind": "windowed", "kv_share": 0.125, "window": 1024, "cached_tokens": 1024}
    assert method.layer_sizes(0) == windowed | {"costs": {"windowed": 0.1}}
    assert method.notice == "full layers: 1, 3, 5, 7"
    shares = method.totals()["windows"]["shares"]
    assert shares == {"1024": 1.0, "2048": 0.75, "4096": 0.625, "8192": 0.5625}
    assert method.kv_elements() == method.facts.kv_elements * LAYERS * 0.5625


def test_first_tokens_count_beside_the_window() -> None:
    settings = SWASettings(kv_budget=0.5, sinks="first")
    method = SWA(config(), settings, "quick")
    held = FIRST + 1023  # the next token sees itself too
    assert method.plan.least_share == held / 8192
    assert method.plan.held([1024, *[None] * 7], 3) == [FIRST + 3, *[3] * 7]
    windows = method.plan.windows(method.plan.spread())
    assert method.plan.share(windows) == (3 * 8192 + 5 * held) / (8 * 8192) <= 0.5
    assert SWA(config(), SWASettings(kv_budget=held / 8192, sinks="first"), "quick").plan.full == 0
    with pytest.raises(BudgetError, match=f"{held / 8192:.4g} of the donor's cache of 8192 tokens is left"):
        SWA(config(), SWASettings(kv_budget=0.125, sinks="first"), "quick")


def test_the_smallest_budget_that_an_error_names_is_enough() -> None:
    def full_layers(budget: float) -> int:
        found: int = plan(SWASettings(kv_budget=budget, window=100, context=512)).full
        return found

    with pytest.raises(
        BudgetError, match=r"0\.1953 of .* is left; choose a budget of at least 0\.1954, a narrower"
    ):
        full_layers(0.1953)  # 100 / 512 is 0.1953125
    assert full_layers(0.1954) == 0


def test_first_tokens_have_a_window_of_any_width_beside_the_donors_own() -> None:
    donor = config(family="gemma2", sliding_window=2048, max_position_embeddings=8192)
    plan_of = [SWA(donor, SWASettings(0.9, window=w, sinks="first"), "quick").plan for w in (None, 512)]
    assert [found.window for found in plan_of] == [2048, 512]
    assert plan_of[1].held(plan_of[1].windows(())) == [2048, FIRST + 511] * (LAYERS // 2)


@pytest.mark.parametrize("budget", [0.5, 1.0])
def test_first_tokens_and_window_are_fewer_than_the_context(budget: float) -> None:
    def planned(window: int | None, context: int = 64, **changes: Any) -> Any:
        settings = SWASettings(budget, window=window, context=context, sinks="first")
        return SWA(config(**changes), settings, "quick").plan

    with pytest.raises(BudgetError, match=r"caches 64 tokens, .* choose --window < 61, or --context > 64"):
        planned(61)
    with pytest.raises(BudgetError, match=r"caches 5 tokens, .* nothing; choose --context > 5"):
        planned(None, 5)
    own = {"family": "gemma2", "sliding_window": 2048}
    with pytest.raises(BudgetError, match=r"window=2048: a layer caches .* choose --window < 1021"):
        planned(None, 1024, **own)
    if budget == 1:
        assert planned(60).least_share == 63 / 64
        assert planned(512, 1024, **own).window == 512


def test_windows_of_the_donor_are_kept() -> None:
    own = {"family": "gemma2", "sliding_window": 2048, "max_position_embeddings": 8192}
    found = plan(SWASettings(kv_budget=0.5), **own)
    kinds = config(**own).layer_types
    assert found.window == 2048
    windows = found.windows(found.spread())
    assert all(w == 2048 for w, kind in zip(windows, kinds, strict=True) if kind == "sliding_attention")
    with pytest.raises(BudgetError, match="window=1024: layer 0 has a window of 2048 already, which is kept"):
        plan(SWASettings(window=1024), **own)
    with pytest.raises(BudgetError, match="context=2048 is not longer than the window of 2048 that layer 0"):
        plan(SWASettings(context=2048), **own)
    with pytest.raises(BudgetError, match=r"at least 0\.\d+, or a longer context"):
        plan(SWASettings(kv_budget=0.1), **own)
    with pytest.raises(BudgetError, match="full_layers has 0, which has a window of 2048 in the donor"):
        plan(SWASettings(full_layers=[0]), **own)
    windows = [{"window": own or (None if index < 4 else 2048)} for index, own in enumerate(found.own)]
    assert plan(SWASettings(plan=windows), **own).windows([1, 3]) == [one["window"] for one in windows]
    with pytest.raises(BudgetError, match="layer 0: its window is 100, and not 2048, the donor's own"):
        plan(SWASettings(plan=[{"window": 100}, *windows[1:]]), **own)
    with pytest.raises(BudgetError, match="plan decides every layer; leave out kv_budget or plan"):
        SWASettings(kv_budget=0.3, plan=windows)
    with pytest.raises(BudgetError, match="plan fixes the KV budget; leave it out to vary it"):
        SWASettings(plan=windows).at_budget(0.5)


def test_a_row_needs_more_than_the_window_only_where_a_layer_is_windowed() -> None:
    rows = [SWA(config(), SWASettings(budget), "quick").least_row for budget in (0.5, 1.0)]
    assert rows == [DEFAULT_WINDOW + 1, 0]


@pytest.mark.parametrize(
    ("window", "reads", "row", "judged"),
    [(512, 8192, 4096, 4096), (4096, 6000, 6000, 8192), (4096, 16384, 8192, 8192)],
)
def test_rows_are_longer_than_the_window_and_judged_whole(
    window: int, reads: int, row: int, judged: int
) -> None:
    donor = config(family="gemma2", sliding_window=window, max_position_embeddings=reads)
    recipe = Recipe("x", "swa", settings=SWASettings(0.9))
    assert row_length(recipe, donor) == row
    assert judged_tokens(recipe, donor) == judged


def test_a_donor_without_a_full_layer_has_nothing_to_window() -> None:
    own = {"family": "mistral", "sliding_window": 2048}
    with pytest.raises(BudgetError, match="a window of its own, of 2048 tokens: there is nothing to window"):
        plan(SWASettings(kv_budget=0.5), **own)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"window": 1}, "window=1 is not a number of tokens from 2"),
        ({"window": 8192}, "window=8192 is not shorter than context=8192"),
        ({"context": 16384}, "context=16384 is more than the 8192 tokens that the donor reads"),
        (
            {"kv_budget": 0.1},
            "with window=1024 in every layer 0.125 of the donor's cache of 8192 tokens is left",
        ),
        ({"kv_budget": 0.0}, "kv_budget=0.0 is outside"),
        ({"full_layers": [8]}, "full_layers has 8, and the donor's layers are 0 to 7"),
        ({"full_layers": [1], "kv_budget": 0.3}, "leave out kv_budget or full_layers"),
        ({"window": 64, "context": 64}, "window=64 is not shorter than context=64"),
    ],
)
def test_what_cannot_be_had_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(BudgetError, match=message):
        plan(SWASettings(**settings))


def test_a_list_of_layers_fixes_the_budget() -> None:
    found = plan(SWASettings(full_layers=[7, 0, 0]))
    assert (found.full, found.spread(), found.divisible) == (2, [0, 7], False)
    with pytest.raises(BudgetError, match="full_layers fixes the KV budget"):
        SWASettings(full_layers=[0]).at_budget(0.5)
