"""The search for the smallest budget: where it looks, that the measured conversion decides, and a resume."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mhconvert
from mhconvert.convert import pipeline
from mhconvert.convert.layer_pass import tolerance_search
from mhconvert.convert.layer_pass.context import ConversionContext
from mhconvert.convert.layer_pass.loss_curve import REACH, round_up, smallest_budget_within
from mhconvert.convert.layer_pass.tolerance_search import step_up
from mhconvert.convert.methods.mla.settings import MLASettings
from mhconvert.convert.recipe.recipe import Recipe, load_recipe
from mhconvert.convert.recipe.tolerance import parse
from mhconvert.errors import BudgetError, OutputError
from mhconvert.progress import Progress
from tests.convert.test_pipeline import hashes
from tests.donors import make_donor

Build = Callable[..., Recipe]
quick = settings(max_examples=200, deadline=None, derandomize=True)
losses = st.lists(st.floats(0, 10), min_size=1, max_size=9)


def power_law(budgets: list[float], exponent: float) -> list[tuple[float, float]]:
    return [(budget, 0.01 * budget**-exponent) for budget in budgets]


@pytest.mark.parametrize("exponent", [1.0, 2.5, 4.0])
@pytest.mark.parametrize("budgets", [[0.125, 0.25, 0.5, 0.9], [0.3, 0.4]])
def test_a_power_law_is_met_where_it_crosses(budgets: list[float], exponent: float) -> None:
    """To 5 %: a fall by more than a factor 4 between two budgets is not trusted."""
    for wanted in (0.32, 0.35):
        allowed = 0.01 * wanted**-exponent
        assert smallest_budget_within(power_law(budgets, exponent), allowed) == pytest.approx(
            wanted, rel=0.05
        )


def test_beyond_what_was_measured_the_last_two_go_on_a_little() -> None:
    measured = power_law([0.3, 0.4], 2.0)
    assert smallest_budget_within(measured, 0.01 * 0.25**-2) == pytest.approx(0.25)
    assert smallest_budget_within(measured, 0.01 * 0.5**-2) == pytest.approx(0.5)
    assert smallest_budget_within(measured, 0.01 * 0.01**-2) == pytest.approx(0.3 / REACH)
    assert smallest_budget_within(measured, 0.01 * 0.99**-2) == pytest.approx(0.4 * REACH)
    assert smallest_budget_within([(0.9, 1.0), (1.0, 0.9)], 0.01) == 1


def test_one_measurement_and_none_that_falls() -> None:
    assert smallest_budget_within([(0.4, 0.1)], 0.2) == pytest.approx(0.4)
    assert smallest_budget_within([(0.4, 0.1)], 0.05) == pytest.approx(0.4 * REACH)
    assert smallest_budget_within([(0.3, 0.1), (0.4, 0.1)], 0.05) == pytest.approx(0.4 * REACH)


@quick
@given(losses, st.floats(0.001, 5))
def test_noise_is_no_reason_to_stop_early(found: list[float], allowed: float) -> None:
    """Every measured budget at or above the answer has at most the allowed loss."""
    measured = [((n + 1) / len(found), loss) for n, loss in enumerate(found)]
    answer = smallest_budget_within(measured, allowed)
    assert 0 < answer <= 1
    assert all(loss <= allowed for budget, loss in measured[:-1] if budget > answer * 1.0001)


def test_round_up() -> None:
    assert [round_up(b) for b in (0.3121, 0.312, 0.99999, 1.0, 0.25)] == [0.313, 0.312, 1.0, 1.0, 0.25]


@quick
@given(st.floats(0.05, 0.99), st.floats(0.06, 5), st.integers(1, 4))
def test_a_miss_is_followed_by_a_larger_budget(failed: float, measured: float, misses: int) -> None:
    tried = [{"kv_budget": failed, "measured": measured}] * misses
    looked = [{"kv_budget": failed / 2, "measured": 2 * measured, "as_asked": True}]
    larger = step_up({"kv_budget": failed, "looked": looked, "tried": tried}, parse("kl=0.05"))
    assert min(1, failed * 1.05) <= larger <= 1
    known = [*looked, {"kv_budget": min(1.0, failed * 1.02), "measured": 0.04, "as_asked": True}]
    state = {"kv_budget": failed, "looked": known, "tried": tried}
    assert step_up(state, parse("kl=0.05")) == min(1.0, failed * 1.02)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_donor(tmp_path_factory.mktemp("search") / "small", layers=2))


@pytest.fixture
def asked(recipe: Build, small: str, tmp_path: Path) -> Build:
    def build(tolerance: str, **changes: Any) -> Recipe:
        plain = {
            "settings": MLASettings(kv_bits="16"),
            "effort": "quick",
            "fit_steps": 0,
            "tolerance": tolerance,
        }
        return dataclasses.replace(recipe(tmp_path / "out", **plain | changes), model=small)

    return build


@pytest.mark.parametrize(("tolerance", "steps"), [("kl=0.02", 3), ("kl=0.004", 0)])
def test_the_smallest_budget_that_is_near_enough(
    asked: Build, tmp_path: Path, tolerance: str, steps: int
) -> None:
    wanted, limit = asked(tolerance, fit_steps=steps), parse(tolerance).limit
    report = mhconvert.convert(wanted)
    found = report["tolerance"]
    assert report["kl"] == found["measured"] <= limit
    assert found["asked"] == tolerance
    assert found["tried"][-1] == {"kv_budget": found["kv_budget"], "measured": report["kl"]}
    assert all(one["measured"] > limit for one in found["tried"][:-1])
    assert load_recipe(tmp_path / "out" / "recipe.yaml") == wanted.at_budget(found["kv_budget"])
    smaller = mhconvert.curve(wanted.at_budget(0.5), (0.75 * found["kv_budget"],))
    assert smaller["points"][0]["kl"] > limit


def test_a_looser_tolerance_takes_no_larger_cache(asked: Build) -> None:
    found = [
        mhconvert.convert(asked(t), force=True)["kv_bytes_per_token"]["converted"]
        for t in ("ppl=1.001", "ppl=1.2")
    ]
    assert found == sorted(found, reverse=True)
    assert found[0] > found[-1]


def test_the_donor_itself_is_near_enough(asked: Build) -> None:
    report = mhconvert.convert(asked("kl=1e-6"))
    assert report["kl"] <= 1e-6
    assert report["tolerance"]["kv_budget"] > 0.9


@pytest.mark.parametrize("steps", [0, 3])
def test_out_of_reach_leaves_nothing(asked: Build, tmp_path: Path, steps: int) -> None:
    rounded = asked("kl=1e-9", dtype="bfloat16", fit_steps=steps)
    with pytest.raises(BudgetError, match=r"no budget meets the tolerance kl=1e-09: .* still measures"):
        mhconvert.convert(rounded)
    assert list(tmp_path.iterdir()) == []


def too_small(context: ConversionContext) -> dict[str, Any]:
    return {"asked": context.recipe.tolerance, "kv_budget": 0.3, "looked": [], "tried": []}


def test_a_miss_is_converted_again(asked: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tolerance_search, "find_budget", too_small)
    told: list[Progress] = []
    wanted = asked("kl=0.01")
    report = mhconvert.convert(wanted, on_progress=told.append)
    tried = report["tolerance"]["tried"]
    assert len(tried) > 1
    assert tried[0]["kv_budget"] == 0.3
    assert [one["measured"] > 0.01 for one in tried] == [True] * (len(tried) - 1) + [False]
    said = [event.message for event in told if event.stage == "search"]
    assert said[0].startswith("budget 0.3 measured ")
    assert len(said) == len(tried) - 1
    last = tried[-1]["kv_budget"]
    direct = dataclasses.replace(wanted.at_budget(last), output=str(tmp_path / "direct"))
    mhconvert.convert(direct)
    assert hashes(tmp_path / "out") == hashes(tmp_path / "direct")


@pytest.mark.parametrize("attempt", [1, 2])
def test_a_resume_does_not_search_again(
    asked: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, attempt: int
) -> None:
    """The first attempt misses; the run is cut in it, or in the second."""
    wanted = asked("kl=0.01")
    with monkeypatch.context() as patch:
        patch.setattr(tolerance_search, "find_budget", too_small)
        mhconvert.convert(dataclasses.replace(wanted, output=str(tmp_path / "whole")))
        begun: list[str] = []

        def stop(event: Progress) -> None:
            begun.extend(["x"] * (event.stage == "layers" and event.done == 0))
            if event.stage == "layers" and event.done == 1 and len(begun) == attempt:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            mhconvert.convert(wanted, on_progress=stop)
    monkeypatch.setattr(tolerance_search, "find_budget", lambda _: pytest.fail("it searched again"))
    with pytest.raises(OutputError, match="started with another tolerance"):
        mhconvert.convert(dataclasses.replace(wanted, tolerance="kl=0.5"), resume=True)
    report = mhconvert.convert(wanted, resume=True)
    assert hashes(tmp_path / "out") == hashes(tmp_path / "whole")
    assert report["tolerance"]["tried"][0]["kv_budget"] == 0.3


def test_a_resume_between_two_attempts_knows_the_first(
    asked: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second is cut before it has begun."""
    begun: list[int] = []
    start = pipeline.layer_steps.teacher_start

    def cut(*of: Any) -> Any:
        begun.append(1)
        if len(begun) == 2:
            (tmp_path / "out.partial" / "model.safetensors").touch()  # as if not all had been removed
            raise KeyboardInterrupt
        return start(*of)

    with monkeypatch.context() as patch:
        patch.setattr(tolerance_search, "find_budget", too_small)
        patch.setattr(pipeline.layer_steps, "teacher_start", cut)
        with pytest.raises(KeyboardInterrupt):
            mhconvert.convert(asked("kl=0.2"))
    told: list[bool] = []

    def look(event: Progress) -> None:
        if event.stage == "layers":
            told.append((tmp_path / "out.partial" / "model.safetensors").exists())

    monkeypatch.setattr(tolerance_search, "find_budget", lambda _: pytest.fail("it searched again"))
    tried = mhconvert.convert(asked("kl=0.2"), resume=True, on_progress=look)["tolerance"]["tried"]
    assert [one["measured"] > 0.2 for one in tried] == [True, False]
    assert not any(told)
    assert tried[0]["kv_budget"] == 0.3


def test_a_dry_run_says_that_the_budget_will_be_searched(asked: Build, tmp_path: Path) -> None:
    plan = pipeline.plan(asked("kl=0.05"))
    assert plan["tolerance"] == "kl=0.05"
    assert plan["kv_bytes_per_token"]["converted"] == plan["kv_bytes_per_token"]["donor"]
    assert plan["layers"] == []
    assert list(tmp_path.iterdir()) == []


def test_codes_are_searched_without_a_fit_and_below_the_largest(
    asked: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Budgets above what the largest code takes are not looked at twice, and no fit follows the closed form."""
    passes: list[list[float]] = []

    def counted(context: ConversionContext, recipes: list[Recipe]) -> dict[str, Any]:
        passes.append([one.settings.kv_budget for one in recipes])
        return trace(context, recipes)

    trace = tolerance_search.budget_curve.trace
    monkeypatch.setattr(tolerance_search.budget_curve, "trace", counted)
    coded = asked("kl=0.02", settings=MLASettings(kv_bits="auto"), fit_steps=3, effort="default")
    found = mhconvert.convert(coded)["tolerance"]
    assert found["measured"] <= 0.02
    assert passes == [[1 / 16, 1 / 8, 3 / 16, 1 / 4, 3 / 8, 1 / 2, 3 / 4]]
    assert all(one["as_asked"] for one in found["looked"])


def test_the_largest_code_is_tried_once(asked: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        tolerance_search, "find_budget", lambda context: too_small(context) | {"kv_budget": 0.7}
    )
    told: list[Progress] = []
    coded = asked("kl=1e-12", settings=MLASettings(kv_bits="auto"))
    with pytest.raises(BudgetError, match=r"no budget meets the tolerance kl=1e-12"):
        mhconvert.convert(coded, on_progress=told.append)
    assert [event.message for event in told if event.stage == "search"] == []
