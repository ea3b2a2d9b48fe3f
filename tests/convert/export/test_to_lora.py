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
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import mhconvert
from mhconvert.convert.methods.hydra import HydraLayer
from mhconvert.errors import AdapterError, MhconvertError, UnsupportedError
from tests.convert.methods.hydra.adapted import difference_elsewhere, relative, tokens
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


@pytest.mark.parametrize("bias", ["hydra_only", "all"])
@pytest.mark.parametrize("targets", [["q_proj", "o_proj"], ["o_proj", "down_proj"]])
def test_trained_biases_go_along(
    saved: Saved, biased_donor: Path, tmp_path: Path, bias: str, targets: list[str]
) -> None:
    folder, model = saved(target_modules=targets, bias=bias)
    before = model(tokens()).logits
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and name.endswith("bias"):
                parameter.add_(0.5)
    model.save_pretrained(folder)
    expected = model(tokens()).logits
    assert relative(before, expected) > 1e-2
    mhconvert.export(str(folder), "lora", str(tmp_path / "out"))
    lora = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(biased_donor), tmp_path / "out"
    ).eval()
    assert relative(lora(tokens()).logits, expected) <= 2e-6


def test_the_products_are_summed_in_float64(saved: Saved, biased_donor: Path, tmp_path: Path) -> None:
    folder, model = saved(**ATTENTION)
    mhconvert.export(str(folder), "lora", str(tmp_path / "out"))
    found = load_file(tmp_path / "out" / "adapter_model.safetensors")
    rounded = 0
    for name, layer in model.base_model.model.named_modules():
        if isinstance(layer, HydraLayer):
            weight, seq = layer.get_base_layer().weight, layer.hydra_seq_A["default"]
            down = found[f"base_model.model.{name}.lora_A.weight"][4:]
            assert torch.equal(down, (seq.double() @ weight.double()).float())
            rounded += (down != seq @ weight).sum().item()
    assert rounded > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_adapters_of_a_float32_base(
    saved: Saved, biased_donor: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    folder, model = saved(**ATTENTION)
    for name, parameter in model.named_parameters():
        if "hydra_" in name:
            parameter.data = parameter.data.to(dtype)
    model.save_pretrained(folder)
    expected = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(biased_donor), folder).eval()
    mhconvert.export(str(folder), "lora", str(tmp_path / "out"))
    lora = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(biased_donor), tmp_path / "out"
    ).eval()
    assert {t.dtype for t in load_file(tmp_path / "out" / "adapter_model.safetensors").values()} == {
        torch.float32
    }
    assert relative(lora(tokens()).logits, expected(tokens()).logits) <= 2e-6


def test_a_head_that_travels_in_the_adapter(saved: Saved, tmp_path: Path) -> None:
    base = make_donor(tmp_path / "untied", tied=False)
    folder, model = saved(base, target_modules=["lm_head", "o_proj"])
    with torch.no_grad():
        model.base_model.model.lm_head.base_layer.weight.mul_(1.5)
    model.save_pretrained(folder)
    expected = model(tokens()).logits
    mhconvert.export(str(folder), "lora", str(tmp_path / "out"))
    lora = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "out").eval()
    assert relative(lora(tokens()).logits, expected) <= 2e-6


@pytest.mark.parametrize(
    ("parts", "factor", "tensor"),
    [
        ("A", 1e37, "o_proj.lora_A.weight"),
        ("AB", 1e25, "o_proj.lora_B.bias"),
    ],  # A W leaves float32; B A b does
)
def test_an_adapter_that_has_diverged(
    saved: Saved, tmp_path: Path, parts: str, factor: float, tensor: str
) -> None:
    base = make_donor(tmp_path / "base", attention_bias=True)
    stored = load_file(base / "model.safetensors")
    stored["model.layers.0.self_attn.o_proj.weight"] *= 1e4
    save_file(stored, base / "model.safetensors", metadata={"format": "pt"})
    folder, _ = saved(base, target_modules=["o_proj"])
    tensors = load_file(folder / "adapter_model.safetensors")
    for part in parts:
        tensors[f"base_model.model.model.layers.0.self_attn.o_proj.hydra_seq_{part}"].fill_(factor)
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(
        AdapterError, match=rf"exporting it makes \S+{tensor} infinite; the adapter has diverged"
    ):
        mhconvert.export(str(folder), "lora", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


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
    with pytest.raises(
        MhconvertError, match="was made by hydra, and gguf holds what --to mla --profile portable makes"
    ):
        mhconvert.export(str(folder), "gguf", str(tmp_path / "out"))
    with pytest.raises(AdapterError, match="trained on a model of another shape"):
        mhconvert.export(
            str(folder), "lora", str(tmp_path / "out"), base=str(make_donor(tmp_path / "x", hidden=32))
        )
    assert not (tmp_path / "out").exists()
