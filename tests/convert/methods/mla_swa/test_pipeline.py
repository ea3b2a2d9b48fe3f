"""Coded latents with windows through the whole pass: what is planned, written, measured, resumed, and refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import mhconvert
from mhconvert.convert.calibration import calibration_rows
from mhconvert.convert.methods.mla_swa.settings import MLASWASettings
from mhconvert.convert.methods.registry import build_method
from mhconvert.convert.open_model import open_model
from mhconvert.convert.recipe.recipe import Calibration, Recipe
from mhconvert.errors import BudgetError, CalibrationError
from mhconvert.eval.cache_size import elements_per_token, lengths
from mhconvert.eval.report.length_rows import by_length
from tests.convert.test_pipeline import hashes, stop_after
from tests.donors import make_config, make_donor

LAYERS, WINDOW, CONTEXT = 4, 16, 128
DONOR_BYTES = LAYERS * 64 * 2  # of a token
PLANNED = {"components_by_bits": {8: 20}, "window": 16}  # 21 bytes of each of 19 tokens


@pytest.fixture(scope="module")
def donor(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_donor(tmp_path_factory.mktemp("mla_swa") / "tiny", layers=LAYERS, std=0.1)


@pytest.fixture(scope="module")
def recipe(donor: Path, text: Path) -> Callable[..., Recipe]:
    def build(output: Path, settings: MLASWASettings | None = None, **changes: Any) -> Recipe:
        options = {
            "settings": settings or MLASWASettings(0.1, window=WINDOW, context=CONTEXT),
            "calibration": Calibration((str(text),), tokens=2048, sequence_length=64, held_out=2),
            "device": "cpu",
        }
        return Recipe(
            **({"model": str(donor), "method": "mla+swa", "output": str(output)} | options | changes)
        )

    return build


def tokens(layer: dict[str, Any], length: int) -> int:
    """That a layer of a report holds of a text of `length`."""
    return 4 + layer["window"] - 1 if layer["window"] else length


@pytest.mark.parametrize("full", [None, [1]], ids=["chosen", "given"])
def test_the_cache_beyond_the_window_has_the_planned_bytes(
    tmp_path: Path, recipe: Callable[..., Recipe], full: list[int] | None
) -> None:
    settings = MLASWASettings(0.04, window=WINDOW, context=CONTEXT, full_layers=full)
    report = mhconvert.convert(recipe(tmp_path / "out", settings))
    windows = [layer["window"] for layer in report["layers"]]
    assert set(windows) == {None, WINDOW}
    assert full is None or [i for i, window in enumerate(windows) if window is None] == full
    used = sum(layer["kv_code_bytes"] * layer["cached_tokens"] for layer in report["layers"])
    assert 0.8 * 0.04 < used / (DONOR_BYTES * CONTEXT) <= 0.04
    cache = report["verified"]["cache"]
    assert cache["tokens"] == CONTEXT
    assert cache["bytes"] == used
    assert report["kv_bytes_per_token"]["converted"] == pytest.approx(used / CONTEXT)
    opened = open_model(str(tmp_path / "out"), device="cpu")
    assert lengths([opened]) == [CONTEXT // 8, CONTEXT]
    assert elements_per_token(opened.model(), [CONTEXT]) == [used / 2 / CONTEXT]
    assert report["windows"]["shares"][str(CONTEXT)] == pytest.approx(used / (DONOR_BYTES * CONTEXT))
    inspected = mhconvert.inspect(str(tmp_path / "out"))
    held = sum(one["kv_code_bytes"] * tokens(one, 8192) for one in report["layers"])
    assert inspected["kv"]["bytes"]["8192"] == held
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["kv_windows"] == windows
    assert (tmp_path / "out" / "modeling_coded_window.py").exists()
    assert report["verified"]["module"] == "transformers_modules"


def test_plan_and_report_count_the_donors_own_windows(tmp_path: Path, recipe: Callable[..., Recipe]) -> None:
    """A gemma2 donor has windows of 17 in layers 0 and 2."""
    model = make_donor(tmp_path / "own", layers=LAYERS, family="gemma2", sliding_window=17)
    settings = MLASWASettings(0.3, window=17, context=CONTEXT)
    asked = recipe(tmp_path / "out", settings, model=str(model), verify=False)
    planned, report = mhconvert.plan(asked), mhconvert.convert(asked)
    donor = (2 * CONTEXT + 2 * 17) * 64 * 4 / CONTEXT
    assert report["kv_bytes_per_token"]["donor"] == pytest.approx(donor)
    assert 0 <= planned["kv_bytes_per_token"]["donor"] - donor < 4


def test_rows_are_twice_a_window_that_is_wider_than_half_of_them(
    tmp_path: Path, recipe: Callable[..., Recipe]
) -> None:
    config = make_config(layers=LAYERS, max_position_embeddings=16384)
    for window, length in ((16, 4096), (4096, 8192)):
        settings = MLASWASettings(0.3, window=window, context=16384)
        asked = recipe(tmp_path / "out", settings, calibration=Calibration(("self",)))
        assert calibration_rows.row_length(asked, config) == length
        assert calibration_rows.judged_tokens(asked, config) == length


@pytest.mark.parametrize(("full", "said"), [(None, "chosen by a survey"), ([0, 1], "2")])
def test_a_plan_without_a_survey_says_at_which_length(full: list[int] | None, said: str) -> None:
    settings = MLASWASettings(0.1, window=WINDOW, context=CONTEXT, full_layers=full)
    method = build_method("mla+swa", make_config(layers=LAYERS), settings, "quick")
    windows = method.totals()["windows"]
    assert (windows["context"], windows["window"]) == (CONTEXT, WINDOW)
    rows = by_length({"windows": windows})
    assert rows[0] == ("full layers", f"{said}; the others see {WINDOW} tokens and the first ones")
    assert [name for name, _ in rows] == ["full layers", "class"]  # no share that a survey decides


def test_a_surveyed_plan_is_that_of_the_conversion(tmp_path: Path, recipe: Callable[..., Recipe]) -> None:
    from mhconvert.eval.fidelity import Fidelity

    asked = recipe(tmp_path / "out", verify=False)
    from mhconvert.convert import pipeline

    planned = pipeline.plan(asked, surveyed=Fidelity)
    (file := tmp_path / "plan.json").write_text(json.dumps(planned))
    report = mhconvert.convert(asked)
    same = replace(asked.settings, plan=file)
    mhconvert.convert(recipe(tmp_path / "planned", same, verify=False))
    weights = (hashes(tmp_path / folder)["model.safetensors"] for folder in ("out", "planned"))
    assert len(set(weights)) == 1
    assert planned["windows"] == report["windows"]
    assert planned["kv_bytes_per_token"]["converted"] == pytest.approx(
        report["kv_bytes_per_token"]["converted"], abs=1
    )


def test_a_resumed_run_writes_the_same(tmp_path: Path, recipe: Callable[..., Recipe]) -> None:
    mhconvert.convert(recipe(tmp_path / "whole", verify=False))
    interrupted = recipe(tmp_path / "resumed", verify=False)
    with pytest.raises(KeyboardInterrupt):
        mhconvert.convert(interrupted, on_progress=stop_after(2, KeyboardInterrupt()))
    mhconvert.convert(interrupted, resume=True)
    assert hashes(tmp_path / "resumed") == hashes(tmp_path / "whole")


def test_a_curve_is_of_the_conversions_and_a_tolerance_is_met(
    tmp_path: Path, recipe: Callable[..., Recipe]
) -> None:
    """Fewer bytes leave more divergence; each point is what a conversion at its budget has."""
    curve = mhconvert.curve(recipe(tmp_path / "out"), [0.3, 0.1, 0.03])
    for field, falling in (("kv_bytes_per_token", True), ("kl", False)):
        values = [point[field] for point in curve["points"]]
        assert len(set(values)) == 3
        assert values == sorted(values, reverse=falling)
    for point in curve["points"]:
        assert 0.8 * point["kv_budget"] < point["kv_share"] <= point["kv_budget"]
    middle = curve["points"][1]
    settings = MLASWASettings(0.1, window=WINDOW, context=CONTEXT)
    report = mhconvert.convert(recipe(tmp_path / "at", settings, verify=False))
    assert report["kv_bytes_per_token"]["converted"] == pytest.approx(middle["kv_bytes_per_token"])
    assert report["kl"] == pytest.approx(middle["kl"], rel=1e-4)
    limit = 1.05 * middle["kl"]
    settings = MLASWASettings(window=WINDOW, context=CONTEXT)
    asked = recipe(tmp_path / "within", settings, tolerance=f"kl={limit}", verify=False)
    found = mhconvert.convert(asked)
    assert 0.5 * limit < found["kl"] == found["tolerance"]["measured"] <= limit
    assert found["tolerance"]["kv_budget"] < 0.12


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kv_budget": 0.0005}, "smallest codes need"),
        (
            {"kv_budget": 0.1, "window": 600},
            "window=600: a layer caches 516 tokens, .* and context=512 is not more",
        ),
        ({"kv_budget": 0.1, "full_layers": [9]}, "full_layers has 9, and the donor's layers are 0 to 3"),
        ({"plan": [PLANNED] * 3}, "the plan has 3 layers and the donor 4"),
        ({"plan": [PLANNED] * 4, "full_layers": [0]}, "leave out full_layers or the plan"),
        (
            {"plan": [PLANNED] * 3 + [PLANNED | {"window": 32}]},
            "layer 3: its window is 32, and not 16, that of the",
        ),
        ({"plan": [PLANNED, {"window": None}]}, "plan, layer 1: it needs components_by_bits"),
        (
            {"plan": [{"components_by_bits": {4: 8}}]},
            "layer 0: it needs window, a number of tokens from 2, or null",
        ),
        (
            {"plan": [PLANNED] * 4, "kv_budget": 0.002},
            "layer 1: 798 bytes of 512 tokens up to here are over the",
        ),
        ({"kv_budget": 0.1, "context": 10**6}, "more than the 512 tokens that the donor reads"),
    ],
)
def test_what_no_plan_fulfils_is_refused(
    tmp_path: Path, recipe: Callable[..., Recipe], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(BudgetError, match=message):
        mhconvert.plan(recipe(tmp_path / "out", MLASWASettings(**({"window": 16} | settings))))


def test_rows_within_the_window_are_refused(tmp_path: Path, recipe: Callable[..., Recipe]) -> None:
    with pytest.raises(CalibrationError, match="rows of 64 tokens show nothing of a window of 100"):
        mhconvert.plan(recipe(tmp_path / "out", MLASWASettings(0.1, window=100)))
