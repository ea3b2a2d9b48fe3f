"""The search on text that the converted model writes: few conversions, the smallest that is within, and a resume."""

from __future__ import annotations

import dataclasses
import errno
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mhconvert
from mhconvert import api
from mhconvert.convert import finished_conversion, pipeline
from mhconvert.convert.layer_pass import tolerance_search
from mhconvert.convert.layer_pass.generation_search import CLOSE, MOST_CONVERSIONS, following
from mhconvert.convert.layer_pass.loss_curve import STEP_UP
from mhconvert.convert.layer_pass.tolerance_search import convert_within_tolerance
from mhconvert.convert.methods.mla.settings import MLASettings
from mhconvert.convert.recipe.recipe import Recipe, load_recipe
from mhconvert.convert.recipe.tolerance import parse
from mhconvert.errors import BudgetError, MhconvertError, OutputError, TextError
from mhconvert.eval.report.units import number
from mhconvert.eval.result_cache import Store
from mhconvert.eval.settings import EvalSettings
from mhconvert.eval.writing import continuations, on_policy
from mhconvert.progress import Progress
from tests.donors import make_donor

Build = Callable[..., Recipe]
ENDS = (1 / 16, 1.0)
GRID = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)
LIMIT = parse("generation=0.2")


def searched(
    loss: Callable[[float], float], size: Callable[[float], int], start: float
) -> list[dict[str, float]]:
    """What is tried from the budget `start` on, where the closed forms lose budget^-2 / 100."""
    looked = [{"kv_budget": share, "measured": share**-2 / 100} for share in GRID]
    state: dict[str, Any] = {"kv_budget": start, "looked": looked, "tried": []}
    while True:
        budget = state["kv_budget"]
        state["tried"].append({"kv_budget": budget, "measured": loss(budget)})
        assert len(state["tried"]) < 20
        found = following(state, LIMIT, ENDS, size)
        if found is None:
            return list(state["tried"])
        state["kv_budget"] = found


def thousandths(budget: float) -> int:
    return round(1000 * budget)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    st.floats(0.5, 5),
    st.floats(0.07, 0.95),
    st.sampled_from([0.0625, 0.2, 0.5, 1.0]),
    st.sampled_from([0, 16]),
)
def test_the_smallest_is_found_by_few_conversions(
    exponent: float, answer: float, start: float, sizes: int
) -> None:
    """Whatever the exponent, and whether budgets come to sixteen sizes or to a thousand."""

    def size(budget: float) -> int:
        return -(-thousandths(budget) * sizes // 1000) if sizes else thousandths(budget)

    def loss(budget: float) -> float:
        rounded = size(budget) / sizes if sizes else budget
        return 0.2 * (answer / rounded) ** exponent

    tried = searched(loss, size, start)
    assert len(tried) <= MOST_CONVERSIONS + 1 + (answer > 0.9)
    last = tried[-1]
    assert last["measured"] <= 0.2
    assert all(one["kv_budget"] >= last["kv_budget"] for one in tried if one["measured"] <= 0.2)
    missed = [one["kv_budget"] for one in tried if one["measured"] > 0.2]
    assert (
        last["measured"] >= CLOSE * 0.2
        or any(last["kv_budget"] <= one * (1 + STEP_UP) for one in missed)
        or any(size(last["kv_budget"]) <= size(one) + 1 for one in missed)
        or size(last["kv_budget"]) == size(ENDS[0])
        or len(tried) >= MOST_CONVERSIONS
    )


def test_the_largest_that_misses_ends_the_search() -> None:
    tried = searched(lambda budget: 0.3 / budget, thousandths, 0.5)
    assert tried[-1] == {"kv_budget": 1.0, "measured": 0.3}


def test_closed_forms_are_scaled_by_the_first_conversion() -> None:
    """They lose 0.04 at a half; the text loses five times that, and 0.19 of the tolerance is aimed at."""
    state = {
        "looked": [{"kv_budget": share, "measured": share**-2 / 100} for share in GRID],
        "tried": [{"kv_budget": 0.5, "measured": 0.2 * 1.5}],
    }
    assert following(state, LIMIT, ENDS, thousandths) == pytest.approx(0.5 * (0.3 / 0.19) ** 0.5, abs=0.001)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_donor(tmp_path_factory.mktemp("writes") / "small", layers=1))


@pytest.fixture
def asked(recipe: Build, small: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Build:
    """Four prompts and twelve tokens instead of forty and 256."""
    prompts = ("The river", "A boat", "She said", "Two and two")
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    monkeypatch.setattr(on_policy, "SETTINGS", EvalSettings(generation=True, max_new_tokens=12))

    def build(tolerance: str, **changes: Any) -> Recipe:
        plain = {
            "prompts": str(tmp_path / "prompts.txt") if tolerance.startswith("generation") else None,
            "settings": MLASettings(kv_bits="16"),
            "effort": "quick",
            "fit_steps": 0,
            "verify": False,
        }
        return dataclasses.replace(
            recipe(tmp_path / "out", tolerance=tolerance, **plain | changes), model=small
        )

    return build


def test_the_smallest_that_writes_near_enough(asked: Build, tmp_path: Path) -> None:
    """Its figure is the one of `mhconvert eval --generation`; the search ends behind a conversion that misses."""
    report = mhconvert.convert(wanted := asked("generation=0.005"))
    found = report["tolerance"]
    assert found["asked"] == "generation=0.005"
    assert report["on_policy"]["kl"] == found["measured"] <= 0.005
    assert (report["on_policy"]["count"], report["on_policy"]["max_new_tokens"]) == (4, 12)
    assert found["tried"][-1] == {
        name: found[name] for name in ("kv_budget", "measured", "stderr", "digest", "kl")
    }
    assert [one for one in found["tried"] if one["measured"] > 0.005]
    assert all(one["kv_budget"] >= found["kv_budget"] for one in found["tried"] if one["measured"] <= 0.005)
    assert load_recipe(tmp_path / "out" / "recipe.yaml") == wanted.at_budget(found["kv_budget"])
    assert not list((tmp_path / "out").rglob("texts"))
    evaluated = EvalSettings(generation=True, prompts=str(tmp_path / "prompts.txt"), max_new_tokens=12)
    model = api.evaluate(str(tmp_path / "out"), evaluated, device="cpu")["generation"]["models"][1]
    assert model["kl"] == pytest.approx(found["measured"], rel=1e-4)
    assert model["kl_stderr"] == pytest.approx(found["stderr"], rel=1e-4)
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    value = f"{number(found['measured'])} ± {found['stderr']:.1g}"
    assert f"| tolerance generation ≤ 0.005 |  | {value} | at budget" in card
    assert "KL on its own texts after 4 prompts of prompts.txt |" in card
    assert finished_conversion.is_result(tmp_path / "out", wanted)
    (other := tmp_path / "other.jsonl").write_text('{"prompt": "A town"}\n{}\n')
    for changed in (dataclasses.replace(wanted, prompts=file) for file in (str(other), None)):
        assert finished_conversion.differing(tmp_path / "out", changed) == "prompts"
    with pytest.raises(TextError, match="other.jsonl, line 2: it has no text in 'prompt'"):
        mhconvert.plan(dataclasses.replace(wanted, prompts=str(other)))


def test_a_resume_goes_on_in_the_texts(asked: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut where the donor has read two of the second conversion's texts, a run writes nothing again."""
    begin = {"asked": "generation=0.02", "kv_budget": 0.7, "looked": [], "tried": []}
    begin["looked"] = [{"kv_budget": 0.5, "measured": 0.02}, {"kv_budget": 0.8, "measured": 0.001}]
    written: list[int] = []
    write, judge = continuations.write, continuations.judge
    monkeypatch.setattr(tolerance_search, "find_budget", lambda _: begin)
    monkeypatch.setattr(continuations, "write", lambda *of: written.append(1) or write(*of))
    wanted = asked("generation=0.02")

    def stop(*of: Any) -> Any:
        if len(written) == 2 and len(read) == 6:
            raise KeyboardInterrupt
        read.append(1)
        return judge(*of)

    read: list[int] = []
    monkeypatch.setattr(continuations, "judge", stop)
    with pytest.raises(KeyboardInterrupt):
        mhconvert.convert(wanted)
    monkeypatch.setattr(continuations, "judge", lambda *of: read.append(1) or judge(*of))
    monkeypatch.setattr(tolerance_search, "find_budget", lambda _: pytest.fail("it searched again"))
    begun: list[Progress] = []
    resumed = mhconvert.convert(wanted, resume=True, on_progress=begun.append)["tolerance"]["tried"]
    assert resumed[0]["kv_budget"] == 0.7
    assert next(event for event in begun if event.stage == "layers").done == 1
    different = len({one["kv_budget"] for one in resumed})
    assert (len(written), len(read)) == (different, 4 * different)


def test_figures_of_other_prompts_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of prompts that was edited before --resume: what was tried with it is tried anew where it counts."""
    monkeypatch.setattr(tolerance_search, "_another", lambda *_: None)
    before = [{"kv_budget": 0.6, "measured": 9.0, "digest": digest} for digest in ("old", "new")]
    recipe = SimpleNamespace(tolerance="generation=0.1", at_budget=lambda _: None)
    context = SimpleNamespace(recipe=recipe, with_recipe=lambda _: None)
    report = {"kl": 0.2, "on_policy": {"kl": 0.05, "kl_stderr": 0.01, "digest": "new"}}
    space = SimpleNamespace(search={"kv_budget": 0.7, "looked": [], "tried": before})
    found = convert_within_tolerance(context, space, lambda _: (None, report))[1]["tolerance"]  # type: ignore[arg-type, return-value]
    assert found["tried"] == [
        before[1],
        {"kv_budget": 0.7, "measured": 0.05, "stderr": 0.01, "digest": "new", "kl": 0.2},
    ]


def test_a_full_disk_leaves_the_run(asked: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OutputError("cannot be written") from OSError(errno.ENOSPC, "No space left on device")

    begin = {"asked": "generation=9", "kv_budget": 0.9, "looked": [], "tried": []}
    with monkeypatch.context() as patch:
        patch.setattr(tolerance_search, "find_budget", lambda _: begin)
        patch.setattr(Store, "save", full)
        with pytest.raises(OutputError, match="the disk is full; 1 layers are finished in .* --resume"):
            mhconvert.convert(asked("generation=9"))
    assert (tmp_path / "out.partial" / "model.safetensors").exists()


def test_out_of_reach_says_the_best_and_leaves_nothing(
    asked: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked = [{"kv_budget": 1.0, "measured": 1e-6}]
    begin = {"asked": "generation=1e-12", "kv_budget": 1.0, "looked": looked, "tried": []}
    monkeypatch.setattr(tolerance_search, "find_budget", lambda _: begin)
    with pytest.raises(
        BudgetError, match=r"no budget meets the tolerance generation=1e-12: .* still measures \d"
    ):
        mhconvert.convert(asked("generation=1e-12", dtype="bfloat16"))
    assert [path.name for path in tmp_path.iterdir()] == ["prompts.txt"]


def test_what_cannot_be_asked_is_refused_first(asked: Build, tmp_path: Path) -> None:
    short = make_donor(tmp_path / "short", layers=1, max_position_embeddings=24)
    wanted = dataclasses.replace(asked("generation=0.2"), model=str(short))
    for refuse in (mhconvert.convert, mhconvert.plan):
        with pytest.raises(
            MhconvertError, match=r"short reads at most 24 tokens, and the longest .* has \d+: no room"
        ):
            refuse(wanted)
    assert not (tmp_path / "out.partial").exists()


def test_a_dry_run_says_that_two_models_are_held(asked: Build) -> None:
    held, writes = (pipeline.plan(asked(tolerance)) for tolerance in ("kl=0.2", "generation=0.2"))
    assert writes["tolerance"] == "generation=0.2"
    parameters = held["parameters"]["donor"] + held["parameters"]["converted"]
    assert writes["memory_needed_bytes"] >= 4 * parameters > 0
