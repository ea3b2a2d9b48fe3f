"""Windows with the first tokens through the whole pass: written, counted, measured, healed, and not exported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import mhconvert
from mhconvert.convert.methods.swa.first_tokens import FIRST
from mhconvert.convert.methods.swa.settings import SWASettings
from mhconvert.convert.open_model import open_model
from mhconvert.convert.recipe.heal_settings import HealSettings
from mhconvert.convert.recipe.recipe import Calibration, Recipe
from mhconvert.errors import ExportError, UnsupportedError
from tests.conftest import Main
from tests.convert.conversions import logits, relative, token_ids
from tests.donors import make_donor

LAYERS, WINDOW, CONTEXT = 4, 16, 128
HELD = FIRST + WINDOW - 1


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("first")


@pytest.fixture(scope="module")
def recipe(place: Path, text: Path) -> Recipe:
    return Recipe(
        str(make_donor(place / "tiny", layers=LAYERS, std=0.1)),
        "swa",
        SWASettings(0.6, window=WINDOW, context=CONTEXT, sinks="first"),
        output=str(place / "out"),
        calibration=Calibration((str(text),), tokens=1024, sequence_length=64, held_out=2),
        device="cpu",
    )


@pytest.fixture(scope="module")
def report(recipe: Recipe) -> dict[str, Any]:
    return mhconvert.convert(recipe)


def test_the_plan_is_what_is_written_and_measured(
    recipe: Recipe, report: dict[str, Any], place: Path
) -> None:
    planned = mhconvert.plan(recipe)
    assert report["kv_bytes_per_token"] == planned["kv_bytes_per_token"]
    elements = 2 * 2 * 16 * 2 * (CONTEXT + HELD)
    assert report["kv_bytes_per_token"]["converted"] == 4 * -(-elements // CONTEXT)
    measured = report["verified"]["cache"]
    assert measured["elements_per_token"] * CONTEXT == elements
    assert report["verified"]["model_class"] == "SWALlamaForCausalLM"
    windows = report["windows"]
    assert (windows["class"], windows["sinks"], windows["full_layers"]) == ("swa_llama", "first", 2)
    assert windows["shares"][str(CONTEXT)] == (CONTEXT + HELD) / (2 * CONTEXT)
    assert report["remote_code"]
    code = {"configuration_swa.py", "modeling_swa.py", "first_tokens.py"}
    assert {path.name for path in (place / "out").glob("*.py")} == code
    config = json.loads((place / "out" / "config.json").read_text())
    assert config["kv_windows"] == [layer["window"] for layer in report["layers"]]
    assert report["kl"] > 0


def test_the_weights_are_the_donors(report: dict[str, Any], place: Path) -> None:
    own, donor = (load_file(place / name / "model.safetensors") for name in ("out", "tiny"))
    assert own.keys() == donor.keys()
    assert all(torch.equal(own[name], donor[name]) for name in donor)
    ids = token_ids(1, WINDOW + FIRST)
    models = [open_model(str(place / name)).model() for name in ("out", "tiny")]
    assert relative(*(logits(model, ids) for model in models)) < 1e-6
    longer = token_ids(1, 3 * WINDOW)
    assert relative(*(logits(model, longer) for model in models)) > 1e-3


def test_commands_take_it(
    report: dict[str, Any], place: Path, text: Path, main: Main, capsys: pytest.CaptureFixture[str]
) -> None:
    out = place / "out"
    found = mhconvert.inspect(str(out))
    assert found["converted_by"] == "swa"
    methods = {name: method for name, method in found["methods"].items() if name != "hydra"}
    assert found["methods"]["hydra"]["applies"]
    for name, method in methods.items():
        assert not method["applies"]
        assert "cannot follow swa (first)" in method["reason"]
        with pytest.raises(UnsupportedError, match=r"cannot follow swa \(first\): .*convert the donor"):
            mhconvert.convert(Recipe(str(out), name, output=str(place / "refused")))
    assert "--to swa --sinks none" in methods["mla"]["reason"]
    elements = found["kv"]["elements_per_token"] / LAYERS
    assert found["kv"]["bytes"]["8192"] == elements * 4 * 2 * (8192 + HELD)
    assert found["attention"]["kv_windows"].count("full") == 2
    assert main("inspect", out) == 0
    assert f"{WINDOW} or full, by layer" in capsys.readouterr().out
    assert "with the first tokens" in (out / "README.md").read_text()
    few = ("--sequence-length", 64, "--sequences", 1, "--device", "cpu")
    assert main("eval", out, "--text", text, *few) == 0
    assert "perplexity" in capsys.readouterr().out
    assert main("generate", out, "The river", "--max-new-tokens", 3) == 0
    with pytest.raises(ExportError, match="no engine keeps the first tokens of --sinks first"):
        mhconvert.export(str(out), to="auto")


def test_its_cache_is_not_coded(
    report: dict[str, Any], place: Path, text: Path, main: Main, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in (["eval", place / "out", "--text", text], ["generate", place / "out", "The river"]):
        assert main(*command, "--kv-cache-dtype", "int4") == 1
        assert (
            "first tokens and a window alone (kv_windows), which --kv-cache-dtype int4"
            in capsys.readouterr().err
        )


def test_it_is_healed_as_it_is(report: dict[str, Any], place: Path, text: Path) -> None:
    settings = HealSettings(tokens=128, data={str(text): 1}, sequence_length=64, batch_tokens=64, held_out=2)
    said: list[str] = []
    healed = mhconvert.heal(
        str(place / "out"),
        settings,
        output=str(place / "healed"),
        on_progress=lambda progress: said.append(progress.message),
    )
    assert any("each document has rows of its own, of which" in words for words in said)
    assert healed["verified"]["model_class"] == "SWALlamaForCausalLM"
    config = [json.loads((place / name / "config.json").read_text()) for name in ("out", "healed")]
    assert config[0]["kv_windows"] == config[1]["kv_windows"]
