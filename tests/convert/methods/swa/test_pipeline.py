"""Windowed layers through the whole pass: what is written, measured, resumed, and refused."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM

import mhconvert
from mhconvert.cli import plan_tables
from mhconvert.convert.calibration import calibration_rows
from mhconvert.convert.methods import registry
from mhconvert.convert.methods.swa.settings import SWASettings
from mhconvert.convert.recipe.recipe import Calibration, Recipe
from mhconvert.errors import CalibrationError
from tests.conftest import Main
from tests.convert.conversions import logits, relative, token_ids
from tests.convert.test_pipeline import hashes, stop_after
from tests.donors import make_donor

LAYERS, WINDOW, CONTEXT = 4, 16, 128


@pytest.fixture(scope="module")
def donor(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_donor(tmp_path_factory.mktemp("swa") / "tiny", layers=LAYERS, std=0.1)


@pytest.fixture(scope="module")
def recipe(donor: Path, text: Path) -> Callable[..., Recipe]:
    def build(output: Path, settings: SWASettings | None = None, **changes: Any) -> Recipe:
        options = {
            "settings": settings or SWASettings(0.6, window=WINDOW, context=CONTEXT),
            "calibration": Calibration((str(text),), tokens=1024, sequence_length=64, held_out=2),
            "device": "cpu",
        }
        return Recipe(**({"model": str(donor), "method": "swa", "output": str(output)} | options | changes))

    return build


@pytest.mark.parametrize("sinks", ["learnt", "none"])
def test_it_writes_a_stock_class_whose_cache_is_as_planned(
    tmp_path: Path, donor: Path, recipe: Callable[..., Recipe], sinks: Any
) -> None:
    settings = SWASettings(0.6, window=WINDOW, context=CONTEXT, sinks=sinks)
    planned = mhconvert.plan(recipe(tmp_path / "out", settings))
    report = mhconvert.convert(recipe(tmp_path / "out", settings, fit_steps=0))
    assert report["verified"]["model_class"] == (
        "GraniteSWAForCausalLM" if sinks == "learnt" else "CwmForCausalLM"
    )
    assert not report["remote_code"]
    assert not list((tmp_path / "out").glob("*.py"))
    assert report["verified"]["cache"]["tokens"] == CONTEXT > WINDOW
    assert report["kv_bytes_per_token"] == planned["kv_bytes_per_token"]
    assert report["windows"]["full_layers"] == 2
    assert [layer["window"] for layer in report["layers"]].count(None) == 2
    assert report["kl"] > 0
    model, original = (AutoModelForCausalLM.from_pretrained(path) for path in (tmp_path / "out", donor))
    ids = token_ids(1, 12)  # shorter than the window
    if sinks == "none":
        assert relative(logits(model, ids), logits(original, ids)) < 1e-6


@pytest.mark.parametrize(
    ("family", "budget", "context"), [("llama", 0.8, 131), ("gemma2", 1.0, CONTEXT), ("gemma2", 0.8, CONTEXT)]
)
def test_plan_and_report_count_the_same_bytes_and_the_donor_own_windows(
    tmp_path: Path, recipe: Callable[..., Recipe], family: str, budget: float, context: int
) -> None:
    """A gemma2 donor has windows of 17 in layers 0 and 2."""
    own: dict[str, Any] = {} if family == "llama" else {"family": family, "sliding_window": 17}
    model = make_donor(tmp_path / "own", layers=LAYERS, **own)
    settings = SWASettings(budget, window=17, context=context)
    asked = recipe(tmp_path / "out", settings, model=str(model), fit_steps=0)
    planned, report = mhconvert.plan(asked), mhconvert.convert(asked)
    assert report["kv_bytes_per_token"] == planned["kv_bytes_per_token"]
    donor, converted = report["kv_bytes_per_token"].values()
    assert converted <= budget * donor + 4
    held = LAYERS * context if family == "llama" else 2 * context + 2 * 17
    assert donor == 4 * math.ceil(held * 2 * 2 * 16 / context)


def test_a_tolerance_does_not_come_back_with_the_donor(tmp_path: Path, recipe: Callable[..., Recipe]) -> None:
    """Four layers have five sizes: neighbouring budgets of one size say nothing of the slope."""
    settings = SWASettings(window=WINDOW, context=CONTEXT)
    report = mhconvert.convert(
        recipe(tmp_path / "out", settings, tolerance="kl=0.02", fit_steps=20, verify=False)
    )
    assert report["kl"] <= 0.02
    assert report["windows"]["full_layers"] < LAYERS


def test_sinks_lower_the_error_of_the_layers(tmp_path: Path, recipe: Callable[..., Recipe]) -> None:
    errors = {}
    for sinks in ("learnt", "none"):
        settings: Any = SWASettings(full_layers=[], window=WINDOW, context=CONTEXT, sinks=sinks)  # type: ignore[arg-type]
        report = mhconvert.convert(recipe(tmp_path / sinks, settings, verify=False, fit_steps=0))
        errors[sinks] = [layer["relative_error"] for layer in report["layers"]]
    assert sum(errors["learnt"]) < sum(errors["none"])


def test_a_resumed_run_and_one_of_its_plan_write_the_same(
    tmp_path: Path, recipe: Callable[..., Recipe]
) -> None:
    report = mhconvert.convert(recipe(tmp_path / "whole", verify=False, fit_steps=10))
    settings = SWASettings(context=CONTEXT, plan=report["layers"])
    mhconvert.convert(recipe(tmp_path / "planned", settings, verify=False, fit_steps=10))
    interrupted = recipe(tmp_path / "resumed", verify=False, fit_steps=10)
    with pytest.raises(KeyboardInterrupt):
        mhconvert.convert(interrupted, on_progress=stop_after(2, KeyboardInterrupt()))
    mhconvert.convert(interrupted, resume=True)
    weights = "model.safetensors"
    for folder in ("resumed", "planned"):
        assert hashes(tmp_path / "whole")[weights] == hashes(tmp_path / folder)[weights]


def test_the_survey_says_what_each_layer_costs(
    tmp_path: Path, donor: Path, text: Path, main: Main, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--window", WINDOW, "--context", CONTEXT, "--kv-budget", 0.6, "--calibration", text]
    asked = ["--calibration-tokens", 1024, "--sequence-length", 64, "--dry-run", "--survey"]
    page = tmp_path / "survey.md"
    assert main(donor, "--to", "swa", *options, *asked, "--report", page, "--json") == 0
    plan = json.loads(capsys.readouterr().out)
    plan_tables.show(plan, console := Console(file=io.StringIO(), width=120))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "128: 56.2 %" in shown
    for layer in plan["layers"]:
        prices = [f"{layer['costs'][kind]:.4g}" for kind in ("windowed", "linear")]
        row = [str(layer["index"]), layer["kind"], *(["16"] if layer["window"] else [])]
        row += ["12.5 %" if layer["window"] else "100 %", *prices]
        assert " ".join(row) in " ".join(shown.replace("│", " ").split())
        assert prices[0] in page.read_text(encoding="utf-8")
    kept = sorted(range(LAYERS), key=lambda i: -plan["layers"][i]["costs"]["windowed"])[:2]
    assert [layer["index"] for layer in plan["layers"] if layer["kind"] == "full"] == sorted(kept)
    assert "".join("█" if i in kept else "▄" for i in range(LAYERS)) in shown
    assert main(donor, "--to", "mla", "--dry-run", "--survey", "--report", page) == 2


def test_a_survey_reads_rows_beyond_a_wide_window(
    tmp_path: Path, donor: Path, recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the rows that layers are usually judged on are not longer than the window."""
    monkeypatch.setattr(calibration_rows, "JUDGE_TOKENS", WINDOW)
    monkeypatch.setitem(registry._ALL, "swa", replace(registry.info("swa"), row_tokens=WINDOW))
    report = mhconvert.convert(recipe(tmp_path / "out", fit_steps=0, verify=False))
    assert report["windows"]["full_layers"] == 2


def test_rows_that_show_nothing_of_the_window_are_refused(
    tmp_path: Path, recipe: Callable[..., Recipe]
) -> None:
    with pytest.raises(CalibrationError, match="rows of 64 tokens show nothing of a window of 64"):
        mhconvert.plan(recipe(tmp_path / "out", SWASettings(0.7, window=64, context=CONTEXT)))


def test_a_dtype_keeps_the_sinks_that_say_no_sink(tmp_path: Path, recipe: Callable[..., Recipe]) -> None:
    """In 16 bits too a layer without a window is the donor's."""
    settings = SWASettings(full_layers=[0, 1, 2], window=WINDOW, context=CONTEXT)
    for dtype in ("float16", "bfloat16"):
        mhconvert.convert(recipe(tmp_path / dtype, settings, dtype=dtype, verify=False))
        model = AutoModelForCausalLM.from_pretrained(tmp_path / dtype)
        gates = (torch.tensor(-20.0) - model.model.layers[0].self_attn.sinks.float()).sigmoid()
        assert (gates == 1).all()


def test_the_fit_lowers_the_error_and_leaves_full_layers_alone(
    tmp_path: Path, donor: Path, recipe: Callable[..., Recipe]
) -> None:
    settings = SWASettings(full_layers=[0, 1], window=WINDOW, context=CONTEXT)
    errors = {}
    for steps in (0, 40):
        report = mhconvert.convert(recipe(tmp_path / str(steps), settings, verify=False, fit_steps=steps))
        errors[steps] = [layer["relative_error"] for layer in report["layers"]]
    fitted = list(zip(errors[0][2:], errors[40][2:], strict=True))
    assert any(after < before for before, after in fitted)  # what does not help a held-out row is taken back
    assert all(after < 1.05 * before for before, after in fitted)
    assert max(errors[40][:2]) < 1e-10
    found, given = (
        AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (tmp_path / "40", donor)
    )
    for index in (0, 1):
        name = f"model.layers.{index}.self_attn.q_proj.weight"
        assert torch.equal(found[name], given[name])
