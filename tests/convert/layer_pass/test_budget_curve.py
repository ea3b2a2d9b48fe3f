"""Several budgets from one pass: the same figures as separate conversions, the donor's work done once."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import mhconvert
from mhconvert.convert.donor.donor import Donor
from mhconvert.convert.methods.mla.settings import MLASettings
from mhconvert.convert.recipe.recipe import Recipe
from mhconvert.errors import BudgetError, CheckpointError, MhconvertError
from tests.convert.conftest import LAYERS
from tests.donors import make_donor

Build = Callable[..., Recipe]


@pytest.mark.parametrize("options", [{}, {"dtype": "bfloat16", "effort": "quick", "fit_steps": None}])
def test_a_point_is_the_conversion_at_its_budget(
    recipe: Build, tmp_path: Path, options: dict[str, Any]
) -> None:
    donor = str(make_donor(tmp_path / "donor", layers=2))
    base = dataclasses.replace(recipe(tmp_path / "out", **options), model=donor)
    result = mhconvert.curve(base, (0.25, 0.75))
    assert [point["kv_budget"] for point in result["points"]] == [0.75, 0.25]
    for point in result["points"]:
        report = mhconvert.convert(base.at_budget(point["kv_budget"]), force=True)
        for key in ("kl", "perplexity", "top1_agreement"):
            assert point[key] == report[key]
        assert point["kv_bytes_per_token"] == report["kv_bytes_per_token"]["converted"]
        errors = [layer["relative_error"] for layer in report["layers"]]
        assert point["mean_relative_error"] == sum(errors) / len(errors)
        assert point["perplexity_ratio"] == report["perplexity"]["converted"] / report["perplexity"]["donor"]
        assert result["kv_bytes_per_token"] == report["kv_bytes_per_token"]["donor"]
        assert result["perplexity"] == report["perplexity"]["donor"]
        assert result["calibration"] == report["calibration"]


def test_the_donors_work_is_done_once(recipe: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, stock = [], Donor.decoder_layer
    monkeypatch.setattr(Donor, "decoder_layer", lambda self, n, *a: read.append(n) or stock(self, n, *a))
    monkeypatch.chdir(tmp_path)
    result = mhconvert.curve(recipe(tmp_path / "out", fit_steps=0), (0.25, 0.5, 0.5, 1.0))
    survey = [*range(LAYERS), *reversed(range(1, LAYERS))]  # forward, and backward to behind the first
    assert read == [*survey, *range(LAYERS)]
    assert [point["kv_budget"] for point in result["points"]] == [1.0, 0.5, 0.25]
    assert result["points"][0]["kl"] < 1e-6
    assert result["points"][0]["perplexity_ratio"] == pytest.approx(1, abs=1e-5)
    assert list(tmp_path.iterdir()) == []  # no checkpoint


def test_budgets_of_one_size_are_one_point(recipe: Build, tmp_path: Path) -> None:
    """A component has 8 bits at most, so all budgets above that share of the bytes come to the same."""
    coded = recipe(tmp_path / "out", settings=MLASettings(), fit_steps=None)
    result = mhconvert.curve(coded, (0.25, 0.9, 0.8, 0.7))
    assert [point["kv_budget"] for point in result["points"]] == [0.7, 0.25]
    assert result["same_size"] == [{"kv_budget": 0.9, "as": 0.7}, {"kv_budget": 0.8, "as": 0.7}]
    assert mhconvert.curve(coded, (0.25,))["same_size"] == []


@pytest.mark.parametrize("seed", [0, 1])
def test_the_curve_falls_on_a_donor_with_structure(recipe: Build, tmp_path: Path, seed: int) -> None:
    """Keys and values whose singular values fall by a fifth each: every element that is added says something new."""
    folder = make_donor(tmp_path / "donor", layers=2, seed=seed)
    weights = load_file(folder / "model.safetensors")
    for name, weight in weights.items():
        if name.endswith(("k_proj.weight", "v_proj.weight")):
            u, s, v = torch.linalg.svd(weight, full_matrices=False)
            weights[name] = ((u * (s[0] * 0.8 ** torch.arange(len(s)))) @ v).contiguous()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    base = dataclasses.replace(recipe(tmp_path / "out", effort="quick", fit_steps=0), model=str(folder))
    points = mhconvert.curve(base)["points"]
    assert [point["kv_budget"] for point in points] == [0.75, 0.5, 0.375, 0.3125, 0.25, 0.1875, 0.125]
    for key in ("kl", "mean_relative_error"):
        found = [point[key] for point in points]
        assert found == sorted(found)
        assert found[-1] > 5 * found[0]


def test_an_own_text_is_what_eval_measures(recipe: Build, text: Path, tmp_path: Path) -> None:
    own = tmp_path / "own.txt"
    own.write_text("A latent holds less than the keys and values of all heads. " * 40, encoding="utf-8")
    base = recipe(tmp_path / "out", effort="quick", fit_steps=0)
    result = mhconvert.curve(base, (0.4,), text=own, sequences=3)
    assert result["measured_on"] == str(own)
    assert result["measured_tokens"] == 3 * 63
    mhconvert.convert(base.at_budget(0.4))
    settings = mhconvert.EvalSettings(text=(own,), sequences=3, sequence_length=64)
    donor, converted = mhconvert.evaluate(str(tmp_path / "out"), settings, device="cpu")["texts"][0]["models"]
    [point] = result["points"]
    assert point["kl"] == pytest.approx(converted["kl"], rel=1e-4)  # float32, layers in another order of rows
    found = {"donor": donor["perplexity"], "converted": converted["perplexity"]}
    assert point["perplexity"] == pytest.approx(found, rel=1e-5)
    with pytest.raises(MhconvertError, match=r"own\.txt has .* choose --sequences"):
        mhconvert.curve(base, (0.4,), text=own, sequences=1000)


@pytest.mark.parametrize(
    ("changes", "budgets", "message"),
    [
        ({}, (), "a curve needs at least one budget"),
        ({}, (0.5, 1.5), r"kv_budget=1\.5 is outside \(0, 1\]"),
        ({}, (0.5, 0.01), r"the nearest that it can: 0\.0469 \(3 elements\), 0\.25 \(16 elements\)"),
        (
            {"settings": MLASettings()},
            (0.5, 0.25, 0.001, 0.9),
            r"kv_budget=0\.001 gives .* the least is kv_budget=0\.0157",
        ),
        ({"settings": MLASettings(kv_lora_rank=8, qk_rope_head_dim=8)}, (0.5,), "leave them out to vary it"),
        ({"settings": MLASettings(kv_bits="16"), "tolerance": "kl=1"}, (0.5,), "leave the tolerance out"),
        ({"settings": MLASettings(profile="portable")}, (0.5,), "cannot express head_dim=16"),
    ],
)
def test_refusals_come_before_the_weights(
    recipe: Build,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    budgets: tuple[float, ...],
    message: str,
) -> None:
    monkeypatch.setattr(Donor, "decoder_layer", lambda *_: pytest.fail("weights were read"))
    with pytest.raises(MhconvertError, match=message):
        mhconvert.curve(recipe(tmp_path / "out", **changes), budgets)


def test_a_portable_budget_out_of_reach_lists_the_nearest(recipe: Build, tmp_path: Path) -> None:
    donor = str(make_donor(tmp_path / "donor", layers=1, head_dim=64))
    settings = MLASettings(profile="portable")
    base = dataclasses.replace(recipe(tmp_path / "out", settings=settings), model=donor)
    with pytest.raises(BudgetError, match=r"portable needs 65 .*can: 0\.254 \(65 elements\), 0\.3125 \(80"):
        mhconvert.curve(base, (0.5, 0.125))


def test_a_broken_layer_stops_the_curve(recipe: Build, tmp_path: Path) -> None:
    folder = make_donor(tmp_path / "bad", layers=2)
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    base = dataclasses.replace(recipe(tmp_path / "out", fit_steps=0), model=str(folder))
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        mhconvert.curve(base, (0.5,))
