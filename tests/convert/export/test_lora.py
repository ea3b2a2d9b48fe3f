"""The exported LoRA is the Hydra adapter: in plain peft, with and without biases, for every mix of ranks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import mhconvert
from mhconvert.convert.errors import AdapterError, MhconvertError, UnsupportedError
from tests.convert.hydra.adapted import difference_elsewhere, relative, tokens
from tests.donors import make_donor

Saved = Callable[..., tuple[Path, Any]]
ATTENTION = {"target_modules": ["q_proj", "o_proj"]}  # with attention_bias, all of these have biases


@pytest.mark.parametrize(
    ("settings", "lora_bias", "bias"),
    [
        (ATTENTION, True, "none"),
        (
            {"target_modules": ["o_proj", "down_proj"]},
            False,
            "lora_only",
        ),  # o_proj has one, down_proj has none
        ({"target_modules": ["down_proj", "gate_proj"]}, False, "none"),
        ({"target_modules": ["o_proj"], "r_seq": 0}, False, "none"),
        ({"target_modules": ["o_proj"], "r_par": 0, "scale": 0.1}, True, "none"),
        ({"target_modules": "all-linear"}, False, "lora_only"),
        (ATTENTION | {"rank_pattern": {"o_proj": {"r_par": 1, "r_seq": 9}}}, True, "none"),
        (
            ATTENTION | {"rank_pattern": {"o_proj": {"r_seq": 0}, "layers.1.*.q_proj": {"r_par": 0}}},
            True,
            "none",
        ),
        (ATTENTION | {"bias": "hydra_only"}, False, "lora_only"),
        (ATTENTION | {"bias": "all"}, False, "all"),
        (ATTENTION | {"modules_to_save": ["norm"]}, True, "none"),
        (ATTENTION | {"layers_to_transform": [1]}, True, "none"),
        (ATTENTION | {"scale": 0.0}, True, "none"),
    ],
)
def test_it_computes_and_merges_the_same(
    saved: Saved,
    biased_donor: Path,
    tmp_path: Path,
    settings: dict[str, Any],
    lora_bias: bool,
    bias: str,
) -> None:
    folder, model = saved(**settings)
    expected = model(tokens()).logits
    report = mhconvert.export(str(folder), "lora", str(tmp_path / "out"))
    assert (report["lora_bias"], report["bias"]) == (lora_bias, bias)
    lora = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(biased_donor), tmp_path / "out"
    ).eval()
    assert lora.peft_type == "LORA"
    held = lora.state_dict()
    for key, tensor in load_file(tmp_path / "out" / "adapter_model.safetensors").items():
        name = key.replace(".lora_A.", ".lora_A.default.").replace(".lora_B.", ".lora_B.default.")
        if "lora_" in key:
            assert torch.equal(held[name], tensor)
    assert relative(lora(tokens()).logits, expected) <= 2e-6
    assert relative(lora.merge_and_unload()(tokens()).logits, expected) <= 1e-5
    mhconvert.merge(str(folder), str(tmp_path / "merged"))
    theirs = load_file(tmp_path / "merged" / "model.safetensors")
    mhconvert.merge(str(tmp_path / "out"), str(tmp_path / "merged-lora"))
    ours = load_file(tmp_path / "merged-lora" / "model.safetensors")
    assert all(relative(ours[name], theirs[name]) <= 1e-6 for name in theirs)


def test_every_scale_is_exact(saved: Saved, tmp_path: Path) -> None:
    patterns = {"o_proj": {"r_par": 1, "r_seq": 2}, "layers.1.mlp.down_proj": {"r_par": 11}}
    folder, _ = saved(scale=0.7, rank_pattern=patterns)
    report = mhconvert.export(str(folder), "lora", str(tmp_path / "out"))
    config: Any = PeftConfig.from_pretrained(str(tmp_path / "out"))
    assert isinstance(config, LoraConfig)
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    for module in report["modules"]:
        rank = tensors[f"base_model.model.{module}.lora_A.weight"].shape[0]
        key = get_pattern_key(list(config.rank_pattern), module)
        assert config.rank_pattern.get(key, config.r) == rank
        alpha = config.alpha_pattern.get(
            get_pattern_key(list(config.alpha_pattern), module), config.lora_alpha
        )
        assert alpha / rank == pytest.approx(0.7, rel=3e-16)
    ranks = {tensors[f"base_model.model.{m}.lora_A.weight"].shape[0] for m in report["modules"]}
    assert ranks == {3, 7, 14}


def test_the_whole_numbers_of_a_uniform_adapter(saved: Saved, tmp_path: Path) -> None:
    folder, _ = saved(r_par=8, r_seq=8, scale=2.0)
    mhconvert.export(str(folder), "lora", str(tmp_path / "out"))
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["rank_pattern"], config["alpha_pattern"]) == (
        16,
        32,
        {},
        {},
    )
    assert type(config["lora_alpha"]) is int
    assert config["lora_dropout"] == 0


def test_plain_peft_loads_it(saved: Saved, biased_donor: Path, tmp_path: Path) -> None:
    folder, model = saved()
    mhconvert.export(str(folder), "lora", str(tmp_path / "out"))
    found = difference_elsewhere(
        tmp_path / "out", model, tmp_path, without=("mhconvert",), opener="peft.AutoPeftModelForCausalLM"
    )
    assert found <= 1e-4
    assert "mhconvert need not be installed" in (tmp_path / "out" / "README.md").read_text()


def test_a_bias_that_is_left_out_would_show(saved: Saved, biased_donor: Path, tmp_path: Path) -> None:
    folder, model = saved(**ATTENTION)
    mhconvert.export(str(folder), "lora", str(tmp_path / "out"))
    lora = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(biased_donor), tmp_path / "out"
    ).eval()
    for name, parameter in lora.named_parameters():
        if name.endswith("lora_B.default.bias"):
            parameter.data.zero_()
    assert relative(lora(tokens()).logits, model(tokens()).logits) > 1e-4


def test_a_bfloat16_base(saved: Saved, tmp_path: Path) -> None:
    base = make_donor(tmp_path / "half", dtype=torch.bfloat16, attention_bias=True)
    folder, model = saved(base)
    mhconvert.export(str(folder), "lora", str(tmp_path / "out"))
    lora = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "out").eval()
    assert relative(lora(tokens()).logits, model(tokens()).logits) <= 2e-2


def test_refusals(saved: Saved, saved_lora: Saved, tmp_path: Path) -> None:
    lora, _ = saved_lora()
    with pytest.raises(UnsupportedError, match="is a LoRA already"):
        mhconvert.export(str(lora), "lora", str(tmp_path / "out"))
    folder, _ = saved()
    with pytest.raises(MhconvertError, match="'gguf' is not an export; choose lora"):
        mhconvert.export(str(folder), "gguf", str(tmp_path / "out"))
    with pytest.raises(AdapterError, match="trained on a model of another shape"):
        mhconvert.export(
            str(folder), "lora", str(tmp_path / "out"), base=str(make_donor(tmp_path / "x", hidden=32))
        )
    assert not (tmp_path / "out").exists()
