"""Whole exports to our own served class: folder, code, proof in a bare process, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig

from mhconvert.convert.export.mla import own_layer, to_own
from mhconvert.convert.methods.mla.settings import MLASettings
from mhconvert.errors import ExportError, OutputError, ProofError
from tests.convert.conversions import LLAMA3, converted, donor_model, logits, relative, token_ids
from tests.convert.export.served_models import checkpoint, ours
from tests.donors import make_checkpoint, make_tokenizer


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("served") / "tiny-mla", family="qwen2", rope=LLAMA3)


def test_the_folder_is_whole(source: Path, tmp_path: Path) -> None:
    seen: list[Any] = []
    report = to_own.export_checkpoint(
        str(source), str(tmp_path / "out"), device="cpu", on_progress=seen.append
    )
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {
        "config.json",
        "configuration_served.py",
        "modeling_served.py",
        "model.safetensors",
        "generation_config.json",
        "tokenizer.json",
        "LICENSE",
        "README.md",
        "mhconvert.json",
    }
    assert not list((tmp_path / "out").glob("*_mla.py"))
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["kv_lora_rank"], config["qk_nope_head_dim"], config["qk_rope_head_dim"]) == (48, 64, 64)
    assert (config["v_head_dim"], config["head_dim"], config["softmax_scale"]) == (128, 48 + 64, 0.125)
    assert config["architectures"] == ["MLAServedQwen2ForCausalLM"] == [report["architecture"]]
    assert config["auto_map"]["AutoModel"] == "modeling_served.MLAServedQwen2Model"
    assert not {"rope_in_latent", "qk_norm", "attention_softcap"} & set(config)
    assert [event.stage for event in seen][:1] == ["donor"]
    assert seen[-1].stage == "done"
    card = (tmp_path / "out" / "README.md").read_text()
    assert (
        "`MLAServedQwen2ForCausalLM`, whose code is in this folder: a cache of 224 elements a token" in card
    )
    assert "| vLLM 0.32 on GPUs | no | its latent caches take" in card
    record = json.loads((tmp_path / "out" / "mhconvert.json").read_text())
    assert record["exported"]["checkpoint"] == str(source)
    assert set(record["sha256"]) == {p.name for p in (tmp_path / "out").iterdir()} - {"mhconvert.json"}


def test_it_is_the_checkpoint_in_a_bare_process(source: Path, tmp_path: Path) -> None:
    report = to_own.export_checkpoint(str(source), str(tmp_path / "out"), device="cpu")
    assert report["to"] == "own"
    assert report["exact"]
    assert report["kv_elements_per_token"] == 2 * (48 + 64)
    assert report["kv_bytes_per_token"] == {"checkpoint": 4 * 224, "export": 4 * 224}
    assert report["padded_v_head_dim"] == 128
    found = report["verified"]
    assert found["module"] == "transformers_modules"
    assert found["model_class"] == "MLAServedQwen2ForCausalLM"
    assert found["greedy_equal"]
    assert found["cache"]["bytes_per_token"] == 4 * 224
    assert found["relative_logit_error"] < 1e-5
    ids = token_ids(3, 40, seed=9)
    assert relative(logits(ours(tmp_path / "out"), ids), logits(ours(source), ids)) < 1e-5
    stored = {name: t.shape for name, t in load_file(tmp_path / "out" / "model.safetensors").items()}
    assert stored["model.layers.1.self_attn.kv_a_layernorm.weight"] == (48,)
    assert report["output_bytes"] == sum(4 * shape.numel() for shape in stored.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_weights_keep_their_bits(tmp_path: Path, dtype: torch.dtype) -> None:
    folder = checkpoint(tmp_path / "tiny-mla", dtype, tied=False)
    report = to_own.export_checkpoint(str(folder), str(tmp_path / "out"), device="cpu", verify=False)
    assert report["dtype"] == str(dtype).removeprefix("torch.")
    assert report["latent_norm_eps"] == (2.0**24 if dtype == torch.float16 else 2.0**30)
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "out"))
    assert {tensor.dtype for tensor in after.values()} == {dtype}
    for name, tensor in before.items():
        if not name.endswith(("kv_b_proj.weight", "o_proj.weight")):
            assert torch.equal(after[name], tensor)
    made, ids = ours(tmp_path / "out", dtype), token_ids(2, 20)
    assert {p.dtype for p in made.parameters()} == {dtype}
    limit = {torch.bfloat16: 0.05, torch.float16: 0.01, torch.float32: 1e-5}[dtype]  # roundings in two layers
    assert relative(logits(made, ids).float(), logits(ours(folder), ids)) < limit
    assert AutoConfig.from_pretrained(tmp_path / "out", trust_remote_code=True).dtype == dtype


def test_another_dtype_and_factor(source: Path, tmp_path: Path) -> None:
    report = to_own.export_checkpoint(
        str(source), str(tmp_path / "out"), dtype="bfloat16", s=2.0**-20, eps=2.0**-20, device="cpu"
    )
    assert report["kv_bytes_per_token"] == {"checkpoint": 4 * 224, "export": 2 * 224}
    assert (report["s"], report["latent_norm_eps"]) == (2.0**-20, 2.0**-20)
    assert report["verified"]["cache"]["elements_per_token"] == 224
    with pytest.raises(ExportError, match="dtype 'int8' is not one of float32, bfloat16, float16"):
        to_own.export_checkpoint(str(source), str(tmp_path / "other"), dtype="int8")
    with pytest.raises(ExportError, match="the latent would be rounded"):
        to_own.export_checkpoint(str(source), str(tmp_path / "other"), s=0.1)


def test_a_mismatch_deletes_the_export(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    true = own_layer.served_tensors

    def wrong(tensors: Any, shape: Any, **options: Any) -> Any:
        made = true(tensors, shape, **options)
        return made | {"q_proj.bias": made["q_proj.bias"] * 0}

    monkeypatch.setattr(to_own, "served_tensors", wrong)
    with pytest.raises(ProofError, match="is not what its checkpoint is, and was removed: .*logits differ"):
        to_own.export_checkpoint(str(source), str(tmp_path / "out"), device="cpu")
    assert list(tmp_path.iterdir()) == []


def test_places(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    planned = to_own.export_checkpoint(str(source), dry_run=True)
    assert planned["output"] == "tiny-mla-own"
    assert list(tmp_path.iterdir()) == []
    to_own.export_checkpoint(str(source), verify=False)
    assert (tmp_path / "tiny-mla-own" / "config.json").is_file()
    with pytest.raises(OutputError, match="exists"):
        to_own.export_checkpoint(str(source), verify=False)
    to_own.export_checkpoint(str(source), verify=False, force=True)
    with pytest.raises(OutputError, match="is read by this command"):
        to_own.export_checkpoint(str(source), str(source), force=True)


def test_refusals(tmp_path: Path) -> None:
    quality = make_checkpoint(tmp_path / "quality")
    with pytest.raises(ExportError, match="own cannot hold this checkpoint: kv_b_proj reads the rotary key"):
        to_own.export_checkpoint(str(quality), str(tmp_path / "out"))
    donor_model().save_pretrained(tmp_path / "stock")
    make_tokenizer().save_pretrained(tmp_path / "stock")
    with pytest.raises(ExportError, match="is no MLA checkpoint; own holds what --to mla --profile portable"):
        to_own.export_checkpoint(str(tmp_path / "stock"), str(tmp_path / "out"))
    converted(donor_model(family="gemma2"), MLASettings(kv_bits="16")).save_pretrained(tmp_path / "gemma")
    make_tokenizer().save_pretrained(tmp_path / "gemma")
    with pytest.raises(ExportError, match="own cannot hold this checkpoint"):
        to_own.export_checkpoint(str(tmp_path / "gemma"), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
