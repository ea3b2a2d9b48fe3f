"""Hybrids through the whole pass: what is planned, written, measured, resumed, and refused."""

from __future__ import annotations

import dataclasses
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import mhconvert
from mhconvert.cli import plan_tables
from mhconvert.convert import pipeline
from mhconvert.convert.layer_pass import time_estimate
from mhconvert.convert.methods.hybrid_mla import method
from mhconvert.convert.methods.hybrid_mla.settings import HybridSettings
from mhconvert.convert.methods.hybrid_mla.states import state_bytes
from mhconvert.convert.recipe.recipe import Calibration, Recipe
from mhconvert.errors import BudgetError, ExportError, UnsupportedError
from mhconvert.eval.fidelity import Fidelity
from tests.convert.test_pipeline import hashes, stop_after
from tests.donors import make_config, make_donor

LAYERS, CONTEXT, SHARE = 4, 256, 0.4
DONOR_BYTES = LAYERS * 32 * 2  # of a token


@pytest.fixture(scope="module")
def donor(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_donor(tmp_path_factory.mktemp("hybrid") / "tiny", layers=LAYERS, hidden=32, std=0.2)


@pytest.fixture(scope="module")
def recipe(donor: Path, text: Path) -> Callable[..., Recipe]:
    def build(output: Path, settings: HybridSettings | None = None, **changes: Any) -> Recipe:
        options = {
            "model": str(donor),
            "settings": settings or HybridSettings(SHARE, context=CONTEXT),
            "calibration": Calibration((str(text),), tokens=1024, sequence_length=64, held_out=2),
            "fit_steps": 5,
            "verify": False,
            "device": "cpu",
        }
        return Recipe(method="hybrid", output=str(output), **(options | changes))

    return build


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, recipe: Callable[..., Recipe]) -> tuple[Path, Any]:
    """A conversion whose linear layer is chosen by a survey, and its report."""
    folder = tmp_path_factory.mktemp("made") / "out"
    return folder, mhconvert.convert(recipe(folder, verify=True))


def test_the_cache_has_the_planned_bytes(made: tuple[Path, Any]) -> None:
    folder, report = made
    [linear] = report["states"]["linear_layers"]
    assert 0 < linear < LAYERS - 1
    codes = sum(layer.get("kv_code_bytes", 0) for layer in report["layers"])
    states = state_bytes(4, 8, 2)
    assert report["layers"][linear]["state_bytes"] == states == report["states"]["state_bytes"]
    assert report["states"]["bytes"] == {str(CONTEXT): codes * CONTEXT + states}
    assert 0.9 * SHARE < report["states"]["shares"][str(CONTEXT)] <= SHARE
    cache = report["verified"]["cache"]  # a float32 donor's convolution has states in float32
    assert cache["bytes"] == codes * CONTEXT + state_bytes(4, 8, 4)
    assert report["verified"]["module"] == "transformers_modules"
    inspected = mhconvert.inspect(str(folder))
    assert inspected["converted_by"] == "hybrid"
    assert inspected["attention"]["linear_layers"] == str(linear)
    assert inspected["kv"]["bytes"]["8192"] == codes * 8192 + state_bytes(4, 8, 4)
    config = json.loads((folder / "config.json").read_text())
    assert (config["linear_layers"], config["linear_mixer"]) == ([linear], "mamba2")
    with pytest.raises(ExportError, match="bailing_hybrid, kimi_linear, granitemoehybrid and nemotron_h"):
        mhconvert.export(str(folder), "own", output=str(folder.parent / "own"))


def test_a_surveyed_plan_is_that_of_the_conversion(
    tmp_path: Path, recipe: Callable[..., Recipe], made: tuple[Path, Any]
) -> None:
    asked = recipe(tmp_path / "out")
    before = mhconvert.plan(asked)["states"]
    assert (before["count"], before["linear_layers"]) == (1, None)
    planned, report = pipeline.plan(asked, surveyed=Fidelity), made[1]
    assert report["priced"] == {"linear": {"method": "hybrid", "mixer": "mamba2"}}
    assert report["priced"].items() <= planned["priced"].items()
    assert planned["states"] == report["states"]
    assert planned["notice"] == f"linear layers: {report['states']['linear_layers'][0]}"
    for planned_layer, layer in zip(planned["layers"], report["layers"], strict=True):
        assert planned_layer["kind"] == layer["kind"]
        assert {"windowed": planned_layer["costs"]["windowed"]} | layer["costs"] == planned_layer["costs"]
        held = layer["kv_elements"]["converted"] / layer["kv_elements"]["donor"]
        assert layer["kv_share"] == pytest.approx(2 * held)  # of a float32 donor: codes are bytes
    assert planned["kv_bytes_per_token"]["converted"] == report["kv_bytes_per_token"]["converted"]


def test_a_resumed_run_and_one_of_its_plan_write_the_same(
    tmp_path: Path, recipe: Callable[..., Recipe], made: tuple[Path, Any]
) -> None:
    interrupted = recipe(tmp_path / "resumed")
    with pytest.raises(KeyboardInterrupt):
        mhconvert.convert(interrupted, on_progress=stop_after(3, KeyboardInterrupt()))
    mhconvert.convert(interrupted, resume=True)
    settings = HybridSettings(SHARE, context=CONTEXT, plan=made[1]["layers"])
    assert "priced" not in mhconvert.convert(recipe(tmp_path / "planned", settings))
    assert hashes(tmp_path / "planned")["model.safetensors"] == hashes(made[0])["model.safetensors"]
    weights = {name: hashed for name, hashed in hashes(tmp_path / "resumed").items() if "safetensors" in name}
    assert weights
    assert weights.items() <= hashes(made[0]).items()


def test_the_layer_stage_brings_a_linear_layer_nearer(tmp_path: Path, recipe: Callable[..., Recipe]) -> None:
    errors = []
    for steps, effort in ((0, "quick"), (60, "quick"), (60, "high")):
        settings = HybridSettings(SHARE, context=CONTEXT, linear_layers=[2], mixer="gated-deltanet")
        asked = recipe(tmp_path / f"{effort}{steps}", settings, fit_steps=steps, effort=effort)
        report = mhconvert.convert(asked)
        assert report["states"]["linear_layers"] == [2]
        errors.append((report["layers"][2]["relative_error"], report["kl"]))
    assert errors[1][0] < 0.95 * errors[0][0]
    assert errors[1][1] < errors[0][1]
    assert errors[2][1] < errors[0][1]  # with the block's output on the student's own states


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kv_budget": 0.01}, "1 states of .* and the smallest codes need .* the least is kv_budget=0"),
        ({"linear_layers": [1, 9]}, "linear_layers has 9, and the donor's layers are 0 to 3"),
        ({"linear_layers": [0, 1, 2, 3]}, "4 of 4 layers are linear: some are to be, and one keeps the text"),
        ({"linear_layers": [1], "linear": 0.5}, "leave out linear or linear_layers"),
        ({"linear": 0.05}, "linear=0.05 of 4 layers is 0; from 1 to 2 can be linear"),
        ({"linear": 0.9}, "linear=0.9 of 4 layers is 4; from 1 to 2 can be linear"),
        ({"linear_layers": "1,two"}, "'1,two' is no list of layers such as 3,7,11"),
        (
            {"plan": [{"kind": "linear"}] * 4},
            "4 of 4 layers are linear: some are to be, and one keeps the text",
        ),
        ({"plan": [{"kind": "linear"}] * 4, "linear": 0.5}, "leave out linear or the plan"),
        ({"plan": [{"kind": "linear"}, {"kind": "full"}]}, "plan, layer 1: it needs components_by_bits"),
        (
            {"plan": [{"kind": "linear"}, {"components_by_bits": {8: 8}}]},
            "the plan has 2 layers and the donor 4",
        ),
        ({"context": 10**6}, "more than the 512 tokens that the donor reads"),
    ],
)
def test_what_no_plan_fulfils_is_refused(
    tmp_path: Path, recipe: Callable[..., Recipe], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(BudgetError, match=message):
        mhconvert.plan(recipe(tmp_path / "out", HybridSettings(**({"context": CONTEXT} | settings))))


def test_a_plan_says_what_its_shares_are_of(
    tmp_path: Path, recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A budget of codes is of 16 bits, which a donor in float32 has twice."""
    monkeypatch.setattr(time_estimate, "PROBE_SECONDS", 1e-4)
    for dtype, of_cache in (
        ("float32", r"2\d\.\d % of float32, 4\d\.\d % of 16 bits"),
        ("bfloat16", r"4\d\.\d %"),
    ):
        asked = HybridSettings(0.5, context=CONTEXT)
        plan = mhconvert.plan(recipe(tmp_path / "out", asked, dtype=dtype))
        plan_tables.show(plan, console := Console(file=io.StringIO(), width=120))
        shown = " ".join(console.file.getvalue().replace("│", " ").split())  # type: ignore[attr-defined]
        assert re.search(f"share of the donor's {of_cache} KV cache of {CONTEXT}", shown)
        assert re.search(rf"share of the donor's at 16 bits {CONTEXT}: [\d.]+ KiB, 4\d\.\d %", shown)


def test_a_layer_of_a_plans_file_is_named(tmp_path: Path) -> None:
    file = tmp_path / "kinds.json"
    file.write_text('{"layers": [{"kind": "linear"}, {"components_by_bits": {"8": 4}}, {"kind": "full"}]}')
    with pytest.raises(
        BudgetError, match=f"^plan {file}, layer 2: it needs components_by_bits, .* it is {{'kind'"
    ):
        HybridSettings(plan=str(file))


@pytest.mark.parametrize(
    ("layers", "advice"), [(1, "linear; convert"), (2, "linear; name one with --linear-layers, or")]
)
def test_a_donor_of_one_or_two_layers_has_a_message_of_its_own(layers: int, advice: str) -> None:
    donor = make_config(layers=layers, hidden=32)
    with pytest.raises(BudgetError, match=f"num_hidden_layers={layers}: .* no other to be {advice}"):
        method.HybridMLA(donor, HybridSettings(0.9), "quick")
    if layers == 2:
        assert method.HybridMLA(donor, HybridSettings(0.9, linear_layers=[1]), "quick").linear == (1,)


def test_the_least_budget_that_is_named_is_enough(tmp_path: Path, recipe: Callable[..., Recipe]) -> None:
    settings = HybridSettings(0.01, context=CONTEXT)
    with pytest.raises(BudgetError) as refused:
        mhconvert.plan(recipe(tmp_path / "out", settings))
    least = float(str(refused.value).rsplit("kv_budget=", 1)[1].split(",")[0])
    mhconvert.plan(recipe(tmp_path / "out", dataclasses.replace(settings, kv_budget=least)))


def test_donors_and_versions_that_cannot_be_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    windowed = make_config(family="mistral", layers=LAYERS, sliding_window=16)
    with pytest.raises(
        UnsupportedError, match="hybrid cannot convert this donor: its layer 0 has a window of 16"
    ):
        method.HybridMLA(windowed, HybridSettings(), "quick")
    monkeypatch.setattr(method, "transformers_version", "5.20.1")
    with pytest.raises(UnsupportedError, match=r"it needs transformers 5\.23, and this is 5\.20\.1"):
        method.HybridMLA(make_config(layers=LAYERS), HybridSettings(), "quick")
