"""A new adapter folder: the identity, loadable, the same from the same seed; no weight of the donor is read."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import mhconvert
from mhconvert.convert.methods.hydra.settings import HydraSettings
from mhconvert.convert.recipe.recipe import Calibration, Recipe, load_recipe
from mhconvert.convert.storage import safetensors_reader
from mhconvert.convert.storage.safetensors_reader import WEIGHTS
from mhconvert.errors import AdapterError, MhconvertError, OutputError, UnsupportedError
from tests.convert.methods.hydra.adapted import layers, tokens
from tests.donors import make_donor, make_gguf


def recipe(donor: Path, output: Path, *, seed: int = 0, **settings: Any) -> Recipe:
    return Recipe(str(donor), "hydra", HydraSettings(**settings), output=str(output), seed=seed)


def test_the_folder_is_the_identity_in_every_loader(biased_donor: Path, tmp_path: Path) -> None:
    report = mhconvert.convert(recipe(biased_donor, tmp_path / "out", r_par=3, r_seq=5, scale=0.5))
    expected = AutoModelForCausalLM.from_pretrained(biased_donor)(tokens()).logits
    model = AutoPeftModelForCausalLM.from_pretrained(str(tmp_path / "out"), is_trainable=True)
    assert torch.equal(model(tokens()).logits, expected)
    assert len(layers(model)) == 4
    assert model.get_nb_trainable_parameters()[0] == report["parameters"]["trainable"]
    assert (
        sum(p.numel() for p in model.get_base_model().parameters()) - report["parameters"]["trainable"]
        == (report["parameters"]["base"])
    )
    assert report["modules"][:2] == ["model.layers.0.self_attn.o_proj", "model.layers.0.mlp.down_proj"]
    assert report["output_bytes"] == 4 * report["parameters"]["trainable"]
    [layer, *_] = layers(model)
    assert layer.hydra_scale == {"default": 0.5}
    assert layer.hydra_par_A["default"].shape == (3, 64)
    assert layer.hydra_seq_A["default"].abs().max() > 0


def test_the_folder_holds_where_it_came_from(biased_donor: Path, tmp_path: Path) -> None:
    wanted = recipe(biased_donor, tmp_path / "out", targets=("q_proj",), dropout=0.1)
    mhconvert.convert(wanted)
    held = {path.name for path in (tmp_path / "out").iterdir()}
    assert held == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "README.md",
        "mhconvert.json",
        "recipe.yaml",
    }
    assert load_recipe(tmp_path / "out" / "recipe.yaml") == wanted
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["target_modules"]) == (str(biased_donor), ["q_proj"])
    record = json.loads((tmp_path / "out" / "mhconvert.json").read_text())
    weights = (tmp_path / "out" / "adapter_model.safetensors").read_bytes()
    assert record["sha256"]["adapter_model.safetensors"] == hashlib.sha256(weights).hexdigest()
    text = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "import mhconvert first" in text
    assert "It is untrained" in text
    assert not (tmp_path / "out.partial").exists()


def test_no_weight_of_the_donor_is_read(
    biased_donor: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> Any:
        raise AssertionError("a weight was read")

    monkeypatch.setattr(safetensors_reader, "read_bytes", refuse)
    mhconvert.convert(recipe(biased_donor, tmp_path / "out"))
    with pytest.raises(AssertionError, match="a weight was read"):  # the guard guards
        mhconvert.merge(str(tmp_path / "out"), str(tmp_path / "merged"))


def test_a_seed_decides_every_byte(biased_donor: Path, tmp_path: Path) -> None:
    files = []
    for name, seed in (("first", 0), ("again", 0), ("other", 1)):
        mhconvert.convert(recipe(biased_donor, tmp_path / name, seed=seed))
        files.append((tmp_path / name / "adapter_model.safetensors").read_bytes())
    assert files[0] == files[1] != files[2]


def test_a_plan_writes_nothing_and_says_the_same(biased_donor: Path, tmp_path: Path) -> None:
    wanted = recipe(biased_donor, tmp_path / "out")
    planned = mhconvert.plan(wanted)
    assert list(tmp_path.iterdir()) == []
    assert mhconvert.convert(wanted) == planned


def test_a_gguf_file_is_a_donor_too(tmp_path: Path) -> None:
    gguf = make_gguf(tmp_path / "tiny.gguf")
    mhconvert.convert(recipe(gguf, tmp_path / "out"))
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(gguf)
    assert 'gguf_file="tiny.gguf"' in (tmp_path / "out" / "README.md").read_text()


def test_a_saved_adapter_can_be_loaded_and_trained_on(biased_donor: Path, tmp_path: Path) -> None:
    mhconvert.convert(recipe(biased_donor, tmp_path / "out"))
    base = AutoModelForCausalLM.from_pretrained(biased_donor)
    model = PeftModel.from_pretrained(base, tmp_path / "out", is_trainable=True)
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    assert all(layer.hydra_par_B["default"].grad.abs().max() > 0 for layer in layers(model))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r_par": 0, "r_seq": 0}, "r_par=0 and r_seq=0 leave nothing to train"),
        (
            {"targets": ("o_proj", "down_prj")},
            "'down_prj' match nothing in LlamaForCausalLM: .* are down_proj",
        ),
        ({"targets": ("lm_head",)}, "'lm_head' is tied to the input embedding"),
        ({"targets": ("embed_tokens",)}, "is a Embedding"),
        ({"scale": float("inf")}, "scale=inf is not a finite number"),
    ],
)
def test_refusals_leave_nothing(
    biased_donor: Path, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(AdapterError, match=message):
        mhconvert.convert(recipe(biased_donor, tmp_path / "out", **settings))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "settings", [{"targets": "o_proj,"}, {"targets": ()}], ids=["an empty name", "an empty list"]
)
def test_targets_that_are_no_list(settings: dict[str, Any]) -> None:
    with pytest.raises(AdapterError, match="targets"):
        HydraSettings(**settings)


@pytest.mark.parametrize(
    ("field", "value"),
    [("tolerance", "kl=0.1"), ("calibration", Calibration(("a.txt",))), ("effort", "quick"), ("fit_steps", 3),
     ("dtype", "bfloat16"), ("device", "cpu"), ("max_shard_size", "1GB"), ("verify", False)],
)  # fmt: skip
def test_settings_of_the_pass_are_refused(field: str, value: Any) -> None:
    with pytest.raises(MhconvertError, match=f"{field} does not apply to hydra"):
        Recipe("tiny", "hydra", **{field: value})


def test_resume_and_curve_have_no_meaning(biased_donor: Path, tmp_path: Path) -> None:
    wanted = recipe(biased_donor, tmp_path / "out")
    with pytest.raises(MhconvertError, match="nothing to resume"):
        mhconvert.convert(wanted, resume=True)
    with pytest.raises(MhconvertError, match="no curve"):
        mhconvert.curve(wanted)


def test_an_existing_folder_is_replaced_only_by_force(biased_donor: Path, tmp_path: Path) -> None:
    wanted = recipe(biased_donor, tmp_path / "out")
    mhconvert.convert(wanted)
    before = (tmp_path / "out" / "adapter_model.safetensors").read_bytes()
    with pytest.raises(OutputError, match="--force"):
        mhconvert.convert(recipe(biased_donor, tmp_path / "out", seed=5))
    assert (tmp_path / "out" / "adapter_model.safetensors").read_bytes() == before
    mhconvert.convert(recipe(biased_donor, tmp_path / "out", seed=5), force=True)
    assert (tmp_path / "out" / "adapter_model.safetensors").read_bytes() != before


def test_a_quantised_donor(tmp_path: Path) -> None:
    donor = make_donor(tmp_path / "tiny")
    config = json.loads((donor / "config.json").read_text())
    (donor / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    save_file({"model.layers.1.mlp.up_proj.qweight": torch.ones(4, 4, dtype=torch.int32)}, donor / WEIGHTS)
    with pytest.raises(UnsupportedError, match=r"quantised \(GPTQ\)"):
        mhconvert.convert(recipe(donor, tmp_path / "out"))
