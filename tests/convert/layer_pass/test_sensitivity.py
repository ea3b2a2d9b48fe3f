"""The passes over the layers measure what one backward pass of the whole model does; conversions with coded latents."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import mhconvert
from mhconvert.convert import pipeline
from mhconvert.convert.calibration import calibration_rows
from mhconvert.convert.donor.donor import open_donor
from mhconvert.convert.layer_pass.context import ConversionContext
from mhconvert.convert.layer_pass.sensitivity import ROW_TOKENS, TOKENS, measure_sensitivities
from mhconvert.convert.methods.mla.settings import MLASettings
from mhconvert.convert.recipe.recipe import Recipe
from mhconvert.eval.fidelity import Fidelity
from mhconvert.heal.layer_fit import fit
from mhconvert.progress import ignore
from tests.convert.methods.mla.coded_models import whole_model_sensitivities
from tests.convert.test_pipeline import hashes, stop_after
from tests.donors import make_donor

Build = Callable[..., Recipe]
CODED = MLASettings(kv_bits="auto", kv_budget=0.25)


def context_of(recipe: Recipe) -> ConversionContext:
    donor, device = open_donor(recipe.model), torch.device("cpu")
    rows = calibration_rows.draw(recipe, donor, device, ignore)
    return ConversionContext(recipe, donor, device, torch.float32, rows, fit, Fidelity, ignore)


@pytest.mark.parametrize("family", ["llama", "phi3", "gemma2"])
def test_layer_by_layer_is_the_whole_model(recipe: Build, tmp_path: Path, family: str) -> None:
    donor = str(make_donor(tmp_path / "donor", family=family, pad_token_id=1))
    context = context_of(dataclasses.replace(recipe(tmp_path / "out"), model=donor, settings=CODED))
    rows = context.rows.fit[:, :ROW_TOKENS]
    rows = rows[: max(1, TOKENS // rows.shape[1])]
    whole = context.donor.model("cpu")
    whole.get_input_embeddings().weight.requires_grad_(True)  # so that gradients flow at all
    expected = whole_model_sensitivities(whole, rows, context.recipe.seed)
    for found, wanted in zip(measure_sensitivities(context), expected, strict=True):
        for field in dataclasses.fields(found):
            one, other = getattr(found, field.name), getattr(wanted, field.name)
            assert (one - other).norm() < 1e-4 * other.norm(), field.name  # fp32 sums in another order


def test_a_layer_that_is_not_heard_gets_fewer_bytes(recipe: Build, tmp_path: Path) -> None:
    make_donor(tmp_path / "donor", layers=3)
    weights = load_file(tmp_path / "donor" / "model.safetensors")
    weights["model.layers.1.self_attn.o_proj.weight"] *= 0.01
    save_file(weights, tmp_path / "donor" / "model.safetensors", metadata={"format": "pt"})
    asked = dataclasses.replace(recipe(tmp_path / "out"), model=str(tmp_path / "donor"), settings=CODED)
    report = mhconvert.convert(asked)
    sizes = [layer["kv_code_bytes"] for layer in report["layers"]]
    assert sizes[1] < min(sizes[0], sizes[2]) / 2
    assert sum(sizes) <= 0.25 * 3 * 64 * 2


def test_the_report_has_the_bytes_of_the_cache_object(recipe: Build, tmp_path: Path) -> None:
    report = mhconvert.convert(dataclasses.replace(recipe(tmp_path / "out"), settings=CODED, verify=True))
    planned = sum(layer["kv_code_bytes"] for layer in report["layers"])
    assert report["kv_bytes_per_token"]["converted"] == pytest.approx(planned, rel=0.02)
    assert report["verified"]["cache"]["bytes_per_token"] == planned
    assert report["verified"]["module"] == "transformers_modules"
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == "mla_coded_llama"
    files = {"latent_code.py", "modeling_coded_mla.py", "modeling_mla.py", "configuration_coded_mla.py"}
    files |= {"coded_kernel.py"}
    assert files <= {path.name for path in (tmp_path / "out").iterdir()}


def test_a_dry_run_with_a_survey_prints_the_bits(recipe: Build, tmp_path: Path) -> None:
    asked = dataclasses.replace(recipe(tmp_path / "out"), settings=CODED)
    plan = pipeline.plan(asked, surveyed=Fidelity)
    assert all(
        set(layer) == {"index", "kv_code_bytes", "kv_lora_rank", "components_by_bits"}
        for layer in plan["layers"]
    )
    assert plan["kv_bytes_per_token"]["converted"] == sum(layer["kv_code_bytes"] for layer in plan["layers"])
    assert "layers" in pipeline.plan(asked)
    assert not (tmp_path / "out").exists()


def test_an_interrupted_conversion_goes_on_with_the_same_bytes(recipe: Build, tmp_path: Path) -> None:
    whole, parts = (
        dataclasses.replace(recipe(tmp_path / name), settings=CODED) for name in ("whole", "parts")
    )
    mhconvert.convert(whole)
    with pytest.raises(KeyboardInterrupt):
        mhconvert.convert(parts, on_progress=stop_after(1, KeyboardInterrupt()))
    mhconvert.convert(parts, resume=True)
    assert hashes(tmp_path / "parts") == hashes(tmp_path / "whole")
