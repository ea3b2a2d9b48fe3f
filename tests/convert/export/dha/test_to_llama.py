"""A DHA checkpoint whose layers are grouped queries is written as its donor's class, and computes the same there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mhconvert.convert.export.dha import to_llama
from mhconvert.errors import ExportError, OutputError
from mhconvert.eval import inspection
from tests.convert.conversions import LLAMA3
from tests.convert.export.dha_exports import Maps, elsewhere, make_dha, require_same
from tests.donors import make_checkpoint, make_donor

# Groups of two, out of order, whose K and V heads are numbered apart: no donor's class holds them as they are.
EQUAL: Maps = [([0, 1, 1, 0], [1, 0, 0, 1]), ([1, 0, 1, 0], [0, 1, 0, 1])]
UNEQUAL: Maps = [([0, 0, 0, 1], [0, 0, 1, 1]), ([0, 1, 1, 0], [0, 0, 0, 0])]
FULL = {"sliding_window": None}


@pytest.mark.parametrize(
    ("donor", "architecture"),
    [
        ({}, "LlamaForCausalLM"),
        ({"kv_heads": 2}, "LlamaForCausalLM"),
        ({"tied": False, "attention_bias": True, "rope": LLAMA3}, "LlamaForCausalLM"),
        ({"head_dim": 24, "mlp_bias": True}, "LlamaForCausalLM"),
        ({"family": "qwen2", "tied": False}, "LlamaForCausalLM"),
        ({"family": "mistral", "head_dim": 32, **FULL}, "LlamaForCausalLM"),
        ({"family": "gemma2", "sliding_window": 32, "query_pre_attn_scalar": 20}, "Gemma2ForCausalLM"),
        ({"family": "granite", "attention_multiplier": 0.3}, "GraniteForCausalLM"),
        ({"family": "granitemoe"}, "GraniteMoeForCausalLM"),
        ({"family": "seed_oss"}, "SeedOssForCausalLM"),
        ({"family": "starcoder2", "use_bias": True, **FULL}, "Starcoder2ForCausalLM"),
    ],
)
def test_it_computes_the_same(tmp_path: Path, donor: dict[str, Any], architecture: str) -> None:
    checkpoint = make_dha(tmp_path, EQUAL, **donor)
    report = to_llama.export_checkpoint(str(checkpoint), str(tmp_path / "out"))
    assert (report["architecture"], report["num_key_value_heads"]) == (architecture, 2)
    assert (report["duplicated_heads"], report["exact"]) == (0, True)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["architectures"], config["num_key_value_heads"]) == ([architecture], 2)
    assert not {"k_head_map", "attention_output_bias", "auto_map"} & config.keys()
    require_same(checkpoint, tmp_path / "out", report)


def test_a_stranger_loads_it(tmp_path: Path) -> None:
    checkpoint = make_dha(tmp_path, EQUAL, tied=False)
    report = to_llama.export_checkpoint(str(checkpoint), str(tmp_path / "out"))
    found = elsewhere(checkpoint, tmp_path / "out", tmp_path)
    assert (found["model_class"], found["module"]) == ("LlamaForCausalLM", "transformers")
    assert found["relative_logit_error"] <= 2e-6
    assert found["cache"]["bytes_per_token"] == report["kv_bytes_per_token"]["export"]


def test_tensors_are_moved_and_none_is_computed(tmp_path: Path) -> None:
    checkpoint = make_dha(tmp_path, EQUAL, dtype=torch.bfloat16)
    report = to_llama.export_checkpoint(str(checkpoint), str(tmp_path / "out"))
    before, after = (load_file(place / "model.safetensors") for place in (checkpoint, tmp_path / "out"))
    assert report["output_bytes"] == sum(t.numel() * t.element_size() for t in after.values())
    assert report["biases"] == ["q_proj", "k_proj", "v_proj", "o_proj"]
    added = after.keys() - before.keys()
    assert {name.split("self_attn.")[1] for name in added} == {"q_proj.bias", "k_proj.bias", "v_proj.bias"}
    assert not any(after[name].any() for name in added)
    for name, tensor in before.items():
        assert after[name].dtype == torch.bfloat16
        assert torch.equal(after[name].flatten().sort().values, tensor.flatten().sort().values)
        assert torch.equal(after[name], tensor) or "_proj.weight" in name
    require_same(checkpoint, tmp_path / "out", report)


def test_what_is_no_weight_comes_along(tmp_path: Path) -> None:
    checkpoint = make_dha(tmp_path, EQUAL)
    to_llama.export_checkpoint(str(checkpoint), str(tmp_path / "out"))
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "LICENSE"):
        assert (tmp_path / "out" / name).read_bytes() == (checkpoint / name).read_bytes()
    record = json.loads((tmp_path / "out" / "mhconvert.json").read_text())
    assert record["exported"]["to"] == "llama"
    assert record["donor"]["reference"] == str(tmp_path / "donor")
    assert "model.safetensors" in record["sha256"]
    assert "LlamaForCausalLM" in (tmp_path / "out" / "README.md").read_text()
    assert inspection.inspect(str(tmp_path / "out"))["converted_by"] == "dha"


def test_without_means_to_add_the_class_stays(tmp_path: Path) -> None:
    """A bias of zeros is no bias: Mistral, which has none, and its window are kept."""
    checkpoint = make_dha(tmp_path, EQUAL, family="mistral", sliding_window=32)
    weights = load_file(checkpoint / "model.safetensors")
    for name, tensor in weights.items():
        if name.endswith("o_proj.bias"):
            tensor.zero_()
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
    report = to_llama.export_checkpoint(str(checkpoint), str(tmp_path / "out"))
    assert (report["architecture"], report["biases"]) == ("MistralForCausalLM", [])
    require_same(checkpoint, tmp_path / "out", report)


def test_copies_of_heads_where_they_are_wanted(tmp_path: Path) -> None:
    """Two K heads of three and one readers: as many as there are query heads are cached."""
    checkpoint = make_dha(tmp_path, UNEQUAL)
    with pytest.raises(ExportError, match=r"layer 0: its 4 query heads read 2 K and 2 V heads in 3 pairs"):
        to_llama.export_checkpoint(str(checkpoint), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    report = to_llama.export_checkpoint(str(checkpoint), str(tmp_path / "out"), duplicate=True)
    assert (report["num_key_value_heads"], report["duplicated_heads"]) == (4, 16 - 7)
    assert report["kv_bytes_per_token"] == {"checkpoint": 7 * 16 * 4, "export": 16 * 16 * 4}
    assert "9 heads are copies" in (tmp_path / "out" / "README.md").read_text()
    require_same(checkpoint, tmp_path / "out", report)


NORMED = [([0, 0, 1, 1], [0, 0, 0, 0]), ([0, 0, 1, 1], [0, 0, 1, 1])]
SPLIT = [([0, 0, 1, 1], [0, 1, 0, 1])] * 2


@pytest.mark.parametrize(
    ("family", "maps", "groups"), [("qwen3", NORMED, 2), ("qwen3", SPLIT, 4), ("olmo2", NORMED, 2)]
)
def test_normed_keys_keep_their_class(
    tmp_path: Path, family: str, maps: list[tuple[list[int], list[int]]], groups: int
) -> None:
    checkpoint = make_dha(tmp_path, maps, family=family, kv_heads=2, attention_bias=True)
    with pytest.raises(ExportError, match="or serve it with trust_remote_code=True"):
        to_llama.export_checkpoint(str(checkpoint), str(tmp_path / "out"))
    report = to_llama.export_checkpoint(str(checkpoint), str(tmp_path / "out"), duplicate=True)
    assert report["num_key_value_heads"] == groups
    require_same(checkpoint, tmp_path / "out", report)


def test_a_norm_over_all_heads_takes_no_copies(tmp_path: Path) -> None:
    checkpoint = make_dha(tmp_path, SPLIT, family="olmo2", kv_heads=2, attention_bias=True)
    with pytest.raises(
        ExportError, match="layer 0 needs copies of K heads, and the donor's norm divides all"
    ):
        to_llama.export_checkpoint(str(checkpoint), str(tmp_path / "out"), duplicate=True)


@pytest.mark.parametrize(
    ("donor", "said"),
    [
        (
            {"family": "mistral", "sliding_window": 8},
            r"model.layers.0.self_attn.o_proj.bias, .*no place in a mistral model and would be lost; .*layer 0 sees "
            r"the last 8 tokens only",
        ),
        ({"family": "mixtral", **FULL}, r"o_proj.bias, .*mixtral model and .*mixtral blocks are not Llama's"),
        (
            {"family": "starcoder2", "use_bias": False, **FULL},
            r"o_proj.bias, .*starcoder2 blocks are not Llama's",
        ),
        ({"family": "phi3", "pad_token_id": 0, **FULL}, r"in phi3 models q, k and v are one matrix"),
    ],
)
def test_what_the_class_cannot_hold(tmp_path: Path, donor: dict[str, Any], said: str) -> None:
    checkpoint = make_dha(tmp_path, EQUAL, **donor)
    with pytest.raises(ExportError, match=said):
        to_llama.export_checkpoint(str(checkpoint), str(tmp_path / "out"))
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(("field", "value"), [("softmax_scale", 0.5), ("attention_softcap", 20.0)])
def test_scores_that_are_not_the_donors(tmp_path: Path, field: str, value: float) -> None:
    checkpoint = make_dha(tmp_path, EQUAL)
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {field: value}))
    with pytest.raises(ExportError, match=r"the configuration of a llama model says 0.25 and None"):
        to_llama.export_checkpoint(str(checkpoint), str(tmp_path / "out"))


def test_checkpoints_of_another_kind(tmp_path: Path) -> None:
    donor = make_donor(tmp_path / "plain")
    with pytest.raises(ExportError, match="plain is no checkpoint that mhconvert converted; llama takes"):
        to_llama.export_checkpoint(str(donor))
    with pytest.raises(ExportError, match="nowhere is no checkpoint that mhconvert converted"):
        to_llama.export_checkpoint(str(tmp_path / "nowhere"))
    with pytest.raises(ExportError, match="latent was made by mla; llama takes"):
        to_llama.export_checkpoint(str(make_checkpoint(tmp_path / "latent")))
    uniform = make_dha(tmp_path / "uniform", [([0, 0, 1, 1], [0, 0, 1, 1])])
    with pytest.raises(ExportError, match="is a LlamaForCausalLM already: engines load it as it is"):
        to_llama.export_checkpoint(str(uniform))


def test_folders_that_are_in_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = make_dha(tmp_path, EQUAL)
    to_llama.export_checkpoint(str(checkpoint), str(tmp_path / "out"))
    with pytest.raises(OutputError, match="exists; choose another folder"):
        to_llama.export_checkpoint(str(checkpoint), str(tmp_path / "out"))
    to_llama.export_checkpoint(str(checkpoint), str(tmp_path / "out"), force=True)
    with pytest.raises(ExportError, match="is an export itself"):
        to_llama.export_checkpoint(str(tmp_path / "out"), str(tmp_path / "again"))
    with pytest.raises(OutputError, match="is read by this command"):
        to_llama.export_checkpoint(str(checkpoint), str(checkpoint), force=True)
    with pytest.raises(OutputError, match="which is only read"):
        to_llama.export_checkpoint(str(checkpoint), str(checkpoint / "out"))
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    with pytest.raises(OutputError, match=r"has 1.00 KB free"):
        to_llama.export_checkpoint(str(checkpoint), str(tmp_path / "full"))
    assert not list(tmp_path.glob("full*"))


def test_its_name_and_its_progress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = make_dha(tmp_path, EQUAL)
    monkeypatch.chdir(tmp_path)
    seen = []
    report = to_llama.export_checkpoint(str(checkpoint), on_progress=seen.append)
    assert report["output"] == "dha-llama"
    assert [(p.stage, p.done, p.total) for p in seen if p.stage != "measure"] == [
        *(("export", n, 2) for n in range(3)),
        ("verify", 0, 1),
        ("done", 1, 1),
    ]
