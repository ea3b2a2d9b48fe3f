"""The survey before a budget is divided: what it finds is true, and a layer that is not heard gets less."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import mhconvert
from mhconvert.convert import pipeline
from mhconvert.convert.calibration import calibration_rows
from mhconvert.convert.donor.donor import open_donor
from mhconvert.convert.layer_pass import survey
from mhconvert.convert.layer_pass.context import ConversionContext
from mhconvert.convert.layer_pass.cost_estimate import output_dtype
from mhconvert.convert.methods.mla.settings import MLASettings
from mhconvert.convert.recipe.recipe import Calibration, Recipe
from mhconvert.eval.fidelity import Fidelity
from mhconvert.heal.layer_fit import fit
from mhconvert.progress import ignore
from tests.convert.test_pipeline import hashes, stop_after
from tests.donors import make_donor

Build = Callable[..., Recipe]
LAYERS = 3
ELEMENTS = 2 * 2 * 16  # K and V, heads, head_dim


def quietened(folder: Path, layer: int, seed: int = 0) -> str:
    """A donor of which one layer's attention says a hundredth of what it would."""
    make_donor(folder, layers=LAYERS, seed=seed)
    weights = load_file(folder / "model.safetensors")
    weights[f"model.layers.{layer}.self_attn.o_proj.weight"] *= 0.01
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


def surveyed(recipe: Recipe) -> tuple[list[Any], calibration_rows.Rows]:
    donor, device = open_donor(recipe.model), torch.device("cpu")
    rows = calibration_rows.draw(recipe, donor, device, ignore)
    dtype = output_dtype(recipe, donor)
    context = ConversionContext(recipe, donor, device, dtype, rows, fit, Fidelity, ignore)
    return survey.measure_needs(context), rows


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_a_layer_that_is_not_heard_gets_less(recipe: Build, tmp_path: Path, layer: int) -> None:
    donor = quietened(tmp_path / "donor", layer)
    asked = dataclasses.replace(recipe(tmp_path / "out", fit_steps=0), model=donor)
    report = mhconvert.convert(asked)
    counts = [one["kv_elements"]["converted"] for one in report["layers"]]
    assert sum(counts) == LAYERS * ELEMENTS / 2
    assert counts[layer] == min(counts) < 0.27 * ELEMENTS  # half of the mean is the least
    assert [one["kv_lora_rank"] + one["qk_rope_head_dim"] for one in report["layers"]] == counts
    even = dataclasses.replace(asked, effort="quick", output=str(tmp_path / "even"))
    assert report["kl"] < mhconvert.convert(even)["kl"]


@pytest.mark.parametrize("seed", [0, 1])
def test_a_need_is_what_the_model_with_that_layer_converted_says(
    recipe: Build, tmp_path: Path, seed: int
) -> None:
    """The divergence, computed here on whole models; the survey estimates it."""
    donor = quietened(tmp_path / "donor", 1, seed)
    asked = dataclasses.replace(recipe(tmp_path / "out"), model=donor)
    needs, rows = surveyed(asked)
    assert [need.probed for need in needs] == [survey.PROBE_BUDGET] * LAYERS
    model = open_donor(donor).model(torch.device("cpu"), torch.float32)
    whole = MLASettings(kv_lora_rank=ELEMENTS // 2, qk_rope_head_dim=ELEMENTS // 2)
    assert needs[1].divergence < 0.01 * min(needs[0].divergence, needs[2].divergence)
    for need in needs:
        assert list(need.errors) == sorted(need.errors, reverse=True)
    ids = rows.fit[-calibration_rows.JUDGES :]
    converted = dataclasses.replace(
        asked, settings=MLASettings(kv_budget=survey.PROBE_BUDGET, kv_bits="16"), effort="quick", fit_steps=0
    )
    mhconvert.convert(converted)
    mhconvert.convert(dataclasses.replace(converted, settings=whole, output=str(tmp_path / "whole")))
    from transformers import AutoModelForCausalLM

    lossy = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    for index, need in enumerate(needs):
        if index == 1:
            continue
        hybrid = open_donor(donor).model(torch.device("cpu"), torch.float32)
        hybrid.model.layers[index].self_attn = lossy.model.layers[index].self_attn
        measured = Fidelity()
        with torch.no_grad():
            for row in ids:
                expected, found = model(row[None]).logits[0, :-1], hybrid(row[None]).logits[0, :-1]
                measured.add(expected, found, row[1:])
        # other shares of rotary key are tried in a conversion, and other statistics: the same to a factor
        assert 0.3 < measured.result()["kl"] / need.divergence < 3


@pytest.mark.parametrize("seed", [0, 1])
def test_the_estimate_is_in_proportion_to_the_exact_divergence(
    recipe: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """Exact: the donor with one layer's output changed as the survey's conversion changes it, at every position.

    Errors of positions that lie far apart are not counted together, nor what a large error does beyond its square.
    """
    donor = make_donor(tmp_path / "donor", layers=8, seed=seed)
    weights = load_file(donor / "model.safetensors")
    for layer in range(8):
        weights[f"model.layers.{layer}.self_attn.o_proj.weight"] *= 0.5 ** (2 + 5 * layer % 6)
    save_file(weights, donor / "model.safetensors", metadata={"format": "pt"})
    calibration = Calibration(recipe(tmp_path / "out").calibration.sources, tokens=4096, sequence_length=256)
    asked = dataclasses.replace(recipe(tmp_path / "out"), model=str(donor), calibration=calibration)
    changes: list[torch.Tensor] = []
    estimate = survey.divergence_of
    monkeypatch.setattr(survey, "divergence_of", lambda *x: changes.append(x[0]) or estimate(*x))
    needs, rows = surveyed(asked)
    model, ids = open_donor(str(donor)).model(torch.device("cpu")), rows.fit[-len(changes[0]) :]
    ratios = []
    with torch.no_grad():
        expected = model(ids).logits.log_softmax(-1)
        for layer, need, change in zip(model.model.layers, needs, reversed(changes), strict=True):
            hook = layer.register_forward_hook(lambda _, __, output, change=change: output + change)
            found = model(ids).logits.log_softmax(-1)
            hook.remove()
            ratios.append((need.divergence, float((expected.exp() * (expected - found)).sum(-1).mean())))
    estimated, exact = torch.tensor(ratios).T
    assert exact.max() > 100 * exact.min()  # there is an order to be found
    assert all(0.5 < ratio < 2 for ratio in (estimated / exact).tolist())
    assert torch.corrcoef(torch.stack((estimated.argsort().argsort(), exact.argsort().argsort())))[0, 1] > 0.9


def test_a_resume_has_the_same_survey(recipe: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    donor = quietened(tmp_path / "donor", 0)
    asked = dataclasses.replace(recipe(tmp_path / "out"), model=donor)
    mhconvert.convert(dataclasses.replace(asked, output=str(tmp_path / "whole")))
    with pytest.raises(KeyboardInterrupt):
        mhconvert.convert(asked, on_progress=stop_after(1, KeyboardInterrupt()))
    monkeypatch.setattr(survey, "measure_needs", lambda *_: pytest.fail("it surveyed again"))
    mhconvert.convert(asked, resume=True)
    assert hashes(tmp_path / "out") == hashes(tmp_path / "whole")


@pytest.mark.parametrize(
    "changes",
    [
        {"effort": "quick"},
        {"settings": MLASettings(kv_lora_rank=16, qk_rope_head_dim=16)},
        {"settings": MLASettings(kv_budget=1.0, kv_bits="16")},
    ],
)
def test_no_survey_where_layers_are_alike(
    recipe: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    monkeypatch.setattr(survey, "measure_needs", lambda *_: pytest.fail("a survey for nothing"))
    asked = recipe(tmp_path / "out", **{"fit_steps": 0} | changes)
    planned = pipeline.plan(asked)["layers"]
    report = mhconvert.convert(asked)
    counts = {layer["kv_elements"]["converted"] for layer in report["layers"]}
    assert counts == {layer["kv_elements"] for layer in planned}
    assert len(counts) == 1


@pytest.mark.parametrize(("family", "heads", "width", "budget"), [("llama", 1, 4, 0.5), ("qwen3", 4, 2, 0.7)])
def test_heads_too_small_for_the_usual_shares(
    recipe: Build, tmp_path: Path, family: str, heads: int, width: int, budget: float
) -> None:
    donor = make_donor(tmp_path / "donor", family=family, heads=4, kv_heads=heads, head_dim=width, layers=2)
    settings = MLASettings(kv_budget=budget, kv_bits="16")
    asked = dataclasses.replace(recipe(tmp_path / "out", settings=settings, fit_steps=0), model=str(donor))
    report = mhconvert.convert(asked)
    counts = [layer["kv_elements"]["converted"] for layer in report["layers"]]
    assert sum(counts) == 2 * round(budget * 2 * heads * width)


def test_a_plan_leaves_open_what_the_survey_decides(recipe: Build, tmp_path: Path) -> None:
    plan = pipeline.plan(recipe(tmp_path / "out"))
    assert all("kv_elements" not in layer for layer in plan["layers"])
    assert plan["kv_elements_per_token"]["converted"] == plan["kv_elements_per_token"]["donor"] / 2
