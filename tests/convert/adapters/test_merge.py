"""`merge`: to the bit what peft's merge_and_unload gives, in a plain checkpoint; and what cannot be merged."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

import mhconvert
from mhconvert.errors import AdapterError, CheckpointError, MhconvertError, OutputError, UnsupportedError
from tests.convert.methods.hydra.adapted import difference_elsewhere, relative, tokens
from tests.donors import make_donor, make_gguf

Saved = Callable[..., tuple[Path, Any]]
SETTINGS: list[dict[str, Any]] = [
    {},
    {"r_par": 0},
    {"r_seq": 0},
    {"target_modules": ["q_proj", "o_proj", "gate_proj"], "rank_pattern": {"o_proj": {"r_seq": 0}}},
    {"bias": "hydra_only"},
    {"modules_to_save": ["norm"]},
    {"target_modules": "all-linear", "layers_to_transform": None},
]


def merged_state(model: Any) -> dict[str, torch.Tensor]:
    return {k: v for k, v in model.merge_and_unload().state_dict().items() if k != "lm_head.weight"}


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("settings", SETTINGS)
def test_it_is_peft_s_merge_to_the_bit(saved: Saved, tmp_path: Path, settings: dict[str, Any]) -> None:
    folder, model = saved(**settings)
    expected = model(tokens()).logits
    report = mhconvert.merge(str(folder), str(tmp_path / "out"))
    assert same(load_file(tmp_path / "out" / "model.safetensors"), merged_state(model))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert relative(plain(tokens()).logits, expected) <= 1e-5
    assert report["method"] == "hydra"
    assert len(report["modules"]) == len(
        {name.rsplit(".hydra_", 1)[0] for name in keys(folder) if "hydra_" in name}
    )


def keys(folder: Path) -> list[str]:
    return list(load_file(folder / "adapter_model.safetensors"))


@pytest.mark.parametrize(
    "settings",
    [{}, {"use_rslora": True}, {"rank_pattern": {"o_proj": 2}, "alpha_pattern": {"down_proj": 3}}],
)
def test_a_lora_too(saved_lora: Saved, tmp_path: Path, settings: dict[str, Any]) -> None:
    folder, model = saved_lora(**settings)
    mhconvert.merge(str(folder), str(tmp_path / "out"))
    found, expected = load_file(tmp_path / "out" / "model.safetensors"), merged_state(model)
    assert found.keys() == expected.keys()
    assert all(relative(found[name], expected[name]) <= 1e-7 for name in found)


def test_a_lora_with_biases(saved_lora: Saved, tmp_path: Path) -> None:
    folder, model = saved_lora(lora_bias=True, target_modules=["o_proj"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B.default.bias"):
                parameter.normal_()
    model.save_pretrained(folder)
    expected = model(tokens()).logits
    mhconvert.merge(str(folder), str(tmp_path / "out"))
    found, theirs = load_file(tmp_path / "out" / "model.safetensors"), merged_state(model)
    assert all(relative(found[name], theirs[name]) <= 1e-7 for name in found)
    assert relative(AutoModelForCausalLM.from_pretrained(tmp_path / "out")(tokens()).logits, expected) <= 1e-5
    bare = make_donor(tmp_path / "bare")
    with pytest.raises(
        AdapterError, match=r"lora_B.bias in .* has no place in .*bare, which has no .*o_proj.bias"
    ):
        mhconvert.merge(str(folder), str(tmp_path / "other"), base=str(bare))


def test_the_folder_is_a_plain_checkpoint(saved: Saved, biased_donor: Path, tmp_path: Path) -> None:
    folder, model = saved()
    mhconvert.merge(str(folder), str(tmp_path / "out"))
    held = {path.name for path in (tmp_path / "out").iterdir()}
    assert held >= {"config.json", "model.safetensors", "tokenizer.json", "generation_config.json", "LICENSE"}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert "auto_map" not in config
    without = ("mhconvert", "peft")
    found = difference_elsewhere(
        tmp_path / "out", model, tmp_path, without=without, opener="transformers.AutoModelForCausalLM"
    )
    assert found <= 1e-4
    assert json.loads((tmp_path / "out" / "mhconvert.json").read_text())["merged"]["adapter"] == str(folder)


def test_shards_dtype_and_base(saved: Saved, biased_donor: Path, tmp_path: Path) -> None:
    folder, model = saved()
    report = mhconvert.merge(
        str(folder), str(tmp_path / "out"), dtype="bfloat16", max_shard_size="100KB", base=str(biased_donor)
    )
    shards = sorted((tmp_path / "out").glob("model-*.safetensors"))
    assert len(shards) > 1
    found = {name: weight for shard in shards for name, weight in load_file(shard).items()}
    expected = merged_state(model)
    assert all(torch.equal(found[name], expected[name].bfloat16()) for name in expected)
    assert report["output_bytes"] == sum(weight.numel() * 2 for weight in found.values())
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16


def test_a_bfloat16_base(tmp_path: Path, saved: Saved) -> None:
    base = make_donor(tmp_path / "half", dtype=torch.bfloat16, attention_bias=True)
    folder, model = saved(base)
    mhconvert.merge(str(folder), str(tmp_path / "out"))
    assert same(load_file(tmp_path / "out" / "model.safetensors"), merged_state(model))


def test_a_gguf_base(tmp_path: Path) -> None:
    gguf = make_gguf(tmp_path / "tiny.gguf", quantization="Q8_0")
    mhconvert.convert(mhconvert.Recipe(str(gguf), "hydra", output=str(tmp_path / "new")))
    mhconvert.merge(str(tmp_path / "new"), str(tmp_path / "out"))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out")(tokens()).logits.isfinite().all()


def test_experts_keep_their_published_names(tmp_path: Path, saved: Saved) -> None:
    base = make_donor(tmp_path / "moe", family="mixtral", num_local_experts=2)
    (base / "model.safetensors").unlink()
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base)).save_pretrained(
        base
    )  # the Hub's names
    folder, model = saved(base)
    mhconvert.merge(str(folder), str(tmp_path / "out"))
    assert any(".block_sparse_moe.experts.1." in name for name in load_file(base / "model.safetensors"))
    found, stored = load_file(tmp_path / "out" / "model.safetensors"), load_file(base / "model.safetensors")
    assert found.keys() == stored.keys()
    logits = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(tokens()).logits
    assert relative(logits, model(tokens()).logits) <= 1e-5
    changed = {
        "model.layers.0.mlp.gate.weight": 2 * stored[GATE],  # stored whole, under another name
        "model.layers.0.mlp.experts.gate_up_proj": torch.ones(2, 256, 64),  # two tensors of each expert
    }
    names = list(changed)
    damaged(folder, lambda t: t.update({f"base_model.model.{names[0]}": changed[names[0]]}))
    mhconvert.merge(str(folder), str(tmp_path / "router"))
    assert torch.equal(load_file(tmp_path / "router" / "model.safetensors")[GATE], changed[names[0]])
    damaged(folder, lambda t: t.update({f"base_model.model.{names[1]}": changed[names[1]]}))
    words = r"changes model.layers.0.mlp.experts.gate_up_proj, which .*moe stores in 4 tensors"
    with pytest.raises(AdapterError, match=words):
        mhconvert.merge(str(folder), str(tmp_path / "again"))


def test_the_adapter_s_tokenizer_wins(saved: Saved, biased_donor: Path, tmp_path: Path) -> None:
    folder, _ = saved()
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    mhconvert.merge(str(folder), str(tmp_path / "out"))
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "{{ messages }}"
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (
        biased_donor / "tokenizer.json"
    ).read_bytes()


def test_an_adapter_of_another_shape(saved: Saved, tmp_path: Path) -> None:
    folder, _ = saved()
    other = make_donor(tmp_path / "other", hidden=32)
    with pytest.raises(
        AdapterError,
        match=r"tensor base_model\S+hydra_par_A in \S+ has shape \[4, (64|128)\], and model\S+weight of \S+other is "
        r"\[32, \d+\]: the adapter was trained on a model of another shape; name that one with --base",
    ):
        mhconvert.merge(str(folder), str(tmp_path / "out"), base=str(other))
    fewer = make_donor(tmp_path / "fewer", layers=1)
    with pytest.raises(AdapterError, match=r"adapts model.layers.1\S+, which \S+fewer does not have"):
        mhconvert.merge(str(folder), str(tmp_path / "out"), base=str(fewer))
    assert not (tmp_path / "out").exists()


def damaged(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


GATE = "model.layers.0.block_sparse_moe.gate.weight"
FIRST = "base_model.model.model.layers.0.mlp.down_proj.hydra_par_"


def diverged(tensors: dict[str, torch.Tensor]) -> None:
    for end in "AB":
        tensors[FIRST + end] = tensors[FIRST + end] * 1e25


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (lambda t: t.update({FIRST + "A": t[FIRST + "A"] * float("nan")}), CheckpointError, "hydra_par_A .* NaN"),
        (lambda t: t.pop(FIRST + "B"), AdapterError, "down_proj.hydra_par_B is missing from .* asks for it"),
        (lambda t: t.update(extra=torch.zeros(2)), AdapterError, "tensor extra in .* has no place in"),
        (diverged, AdapterError, "merging it makes model.layers.0.mlp.down_proj.weight infinite; the adapter has"),
        (dict.clear, CheckpointError, "holds no tensors"),
    ],
)  # fmt: skip
def test_damaged_adapters(saved: Saved, tmp_path: Path, change: Any, kind: Any, message: str) -> None:
    folder, _ = saved()
    damaged(folder, change)
    with pytest.raises(kind, match=message):
        mhconvert.merge(str(folder), str(tmp_path / "out"))
    assert {path.name for path in tmp_path.iterdir()} == {"adapter"}


def test_folders_that_are_no_adapter(biased_donor: Path, saved: Saved, tmp_path: Path) -> None:
    for folder, message in (
        (biased_donor, "is a model, not an adapter"),
        (tmp_path, "has no adapter_config.json"),
    ):
        with pytest.raises(CheckpointError, match=message):
            mhconvert.merge(str(folder), str(tmp_path / "out"))
    folder, _ = saved()
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(
        CheckpointError, match="holds no adapter_model.safetensors; load it with peft where you trust"
    ):
        mhconvert.merge(str(folder), str(tmp_path / "out"))


def rewrite(folder: Path, **changes: Any) -> None:
    held = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(held | changes))


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"peft_type": "IA3"}, UnsupportedError, "is a IA3 adapter; mhconvert reads Hydra and LoRA"),
        (
            {"base_model_name_or_path": None},
            CheckpointError,
            "names no base model; say which one it is with --base",
        ),
        ({"base_model_name_or_path": "./gone"}, CheckpointError, "'./gone' is no folder"),
        ({"r_par": 0, "r_seq": 0}, AdapterError, "leave nothing to train"),
    ],
)
def test_configs_that_lead_nowhere(
    saved: Saved, tmp_path: Path, changes: dict[str, Any], kind: Any, message: str
) -> None:
    folder, _ = saved()
    rewrite(folder, **changes)
    with pytest.raises(kind, match=message):
        mhconvert.merge(str(folder), str(tmp_path / "out"))


def test_a_lora_that_is_more_than_a_product(saved_lora: Saved, tmp_path: Path) -> None:
    folder, _ = saved_lora(use_dora=True)
    with pytest.raises(UnsupportedError, match=r"use_dora=True.*merge it with peft"):
        mhconvert.merge(str(folder), str(tmp_path / "out"))


def test_a_quantised_base(saved: Saved, biased_donor: Path, tmp_path: Path) -> None:
    folder, _ = saved()
    other = make_donor(tmp_path / "awq")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "awq"}}))
    weights = load_file(other / "model.safetensors")
    save_file(
        weights | {"model.layers.0.mlp.up_proj.qweight": torch.ones(8, 8, dtype=torch.int32)},
        other / "model.safetensors",
    )
    with pytest.raises(
        UnsupportedError, match=r"awq cannot take an adapter in: its weights are quantised \(AWQ\)"
    ):
        mhconvert.merge(str(folder), str(tmp_path / "out"), base=str(other))


def test_saved_heads_of_tied_models(saved: Saved, tmp_path: Path) -> None:
    folder, _ = saved(modules_to_save=["lm_head"])
    with pytest.raises(AdapterError, match=r"holds lm_head.weight of its own.*merge it in Python"):
        mhconvert.merge(str(folder), str(tmp_path / "out"))


def test_other_faults_name_the_way_out(saved: Saved, biased_donor: Path, tmp_path: Path) -> None:
    folder, _ = saved()
    with pytest.raises(MhconvertError, match="dtype 'int8' is not one of float32"):
        mhconvert.merge(str(folder), str(tmp_path / "out"), dtype="int8")
    with pytest.raises(OutputError, match="is read by this command"):
        mhconvert.merge(str(folder), str(biased_donor), force=True)
    with pytest.raises(OutputError, match="is read by this command"):
        mhconvert.merge(str(folder), str(folder), force=True)
    (tmp_path / "out.partial").mkdir()  # as a run leaves it that was killed at once
    with pytest.raises(OutputError, match="is there already: --force starts over"):
        mhconvert.merge(str(folder), str(tmp_path / "out"))
    mhconvert.merge(str(folder), str(tmp_path / "out"), force=True)
    assert (tmp_path / "out" / "config.json").is_file()
