"""Whole exports to DeepSeek-V3 and Youtu: logits, cache and greedy text of the stock class, and every refusal."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from mhconvert.convert.donor.gguf_reader import read_gguf_header
from mhconvert.convert.export import engine_support, forms, same_outputs, verify_folder
from mhconvert.convert.export.mla import deepseek_layer, deepseek_tensors, padded_row, to_deepseek_v3
from mhconvert.convert.methods import registry
from mhconvert.convert.methods.mla.settings import MLASettings
from mhconvert.errors import CheckpointError, ExportError, OutputError, ProofError
from tests.convert.conversions import (
    LINEAR,
    LLAMA3,
    YARN,
    converted,
    donor_model,
    logits,
    relative,
    token_ids,
)
from tests.donors import make_checkpoint, make_tokenizer

PORTABLE = MLASettings(kv_lora_rank=96, qk_rope_head_dim=64, profile="portable")
WIDE = {"head_dim": 64, "hidden": 96, "heads": 4, "kv_heads": 2}


def checkpoint(path: Path, *, settings: MLASettings = PORTABLE, seed: int = 0, **donor: Any) -> Path:
    """A converted tiny donor in a folder, its modeling files beside it as save_pretrained puts them."""
    model = converted(donor_model(seed, **(WIDE | donor)), settings)
    model.save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    (path / "LICENSE").write_text("Tiny test licence\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("export") / "tiny-mla")


def loaded(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def ours(folder: Path) -> Any:
    registry.register("mla")
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()


@pytest.mark.parametrize("to", ["deepseek_v3", "youtu"])
@pytest.mark.parametrize(
    "donor",
    [
        {},
        {"tied": False, "seed": 2},
        {"kv_heads": 4, "rms_norm_eps": 1e-5},
        {"head_dim": 128, "hidden": 64, "rms_norm_eps": 1e-3},
    ],
)
def test_the_stock_class_computes_what_ours_does(tmp_path: Path, to: str, donor: dict[str, Any]) -> None:
    source = checkpoint(tmp_path / "tiny-mla", **donor)
    report = to_deepseek_v3.export_checkpoint(str(source), to, str(tmp_path / "out"), device="cpu")
    model, ids = loaded(tmp_path / "out"), token_ids(3, 40, seed=7)
    assert type(model).__name__ == report["architecture"] == deepseek_tensors.CLASSES[to]
    assert relative(logits(model, ids), logits(ours(source), ids)) < 2e-5
    assert report["verified"]["greedy_equal"]
    assert report["verified"]["module"] == "transformers"
    assert (
        report["verified"]["cache"]["elements_per_token"] == 2 * (96 + 64) == report["kv_elements_per_token"]
    )
    wide = donor.get("head_dim", 64) == 64
    assert report["padded_v_head_dim"] == (128 if wide else None)
    assert (tmp_path / "out" / "LICENSE").read_text() == "Tiny test licence\n"
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "auto_map" not in config
    assert (config["qk_nope_head_dim"], config["qk_rope_head_dim"]) == (donor.get("head_dim", 64), 64)
    assert not list((tmp_path / "out").glob("*.py"))
    assert json.loads((tmp_path / "out" / "mhconvert.json").read_text())["exported"]["to"] == to


def test_youtus_head_is_a_cached_row_and_its_rope_is_not(plain: Path, tmp_path: Path) -> None:
    """vLLM takes head_dim for the size of the cache; RoPE turns qk_rope_head_dim elements all the same."""
    to_deepseek_v3.export_checkpoint(str(plain), "youtu", str(tmp_path / "out"), device="cpu", verify=False)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["head_dim"] == AutoConfig.from_pretrained(tmp_path / "out").head_dim == 96 + 64
    model = loaded(tmp_path / "out")
    donors = ours(plain).model.rotary_emb.inv_freq
    torch.testing.assert_close(
        model.model.rotary_emb.inv_freq, donors
    )  # 64 elements of 64, in the donor's order


@pytest.mark.parametrize(("rank", "rope"), [(1, 2), (48, 64), (413, 98), (512, 64), (2971, 256)])
def test_youtus_share_is_whole(rank: int, rope: int) -> None:
    shape = deepseek_layer.LatentShape(1, rank, 64, rope, 64, 64)
    made = deepseek_layer.of_a_row({"rope_type": "llama3"}, shape)
    assert int(made["head_dim"] * made["rope_parameters"]["partial_rotary_factor"]) == rope
    assert made["rope_parameters"]["rope_type"] == "llama3"


@pytest.mark.parametrize("rope", [LLAMA3, LINEAR])
def test_scaled_rope_goes_to_youtu_alone(tmp_path: Path, rope: dict[str, Any]) -> None:
    source = checkpoint(tmp_path / "scaled", rope=rope)
    with pytest.raises(
        ExportError, match=f"deepseek_v3 cannot hold this checkpoint: rope_type {rope['rope_type']}"
    ):
        to_deepseek_v3.export_checkpoint(str(source), "deepseek_v3", str(tmp_path / "out"))
    to_deepseek_v3.export_checkpoint(str(source), "youtu", str(tmp_path / "out"), device="cpu")
    ids = token_ids(2, 60, seed=3)
    assert relative(logits(loaded(tmp_path / "out"), ids), logits(ours(source), ids)) < 2e-5


def test_bfloat16_loses_what_rounding_loses(plain: Path, tmp_path: Path) -> None:
    report = to_deepseek_v3.export_checkpoint(
        str(plain), "deepseek_v3", str(tmp_path / "out"), dtype="bfloat16", device="cpu"
    )
    assert AutoConfig.from_pretrained(tmp_path / "out").dtype == torch.bfloat16
    model, ids = ours(plain), token_ids(3, 40, seed=7)
    expected = logits(model, ids)
    rounded = logits(model.to(torch.bfloat16).float(), ids)
    found = relative(logits(loaded(tmp_path / "out"), ids), expected)
    assert found < 3 * relative(rounded, expected)
    assert report["kv_bytes_per_token"] == 2 * (96 + 64) * 2


def test_left_padding_and_the_cache(plain: Path, tmp_path: Path) -> None:
    to_deepseek_v3.export_checkpoint(
        str(plain), "deepseek_v3", str(tmp_path / "out"), device="cpu", verify=False
    )
    model, ids = loaded(tmp_path / "out"), token_ids(1, 12, seed=5)
    padded = torch.cat((torch.ones(1, 4, dtype=torch.long), ids), dim=1)
    mask = torch.cat((torch.zeros(1, 4, dtype=torch.long), torch.ones_like(ids)), dim=1)
    with torch.no_grad():
        whole = model(input_ids=ids).logits
        behind = model(input_ids=padded, attention_mask=mask).logits[:, 4:]
        first = model(input_ids=ids[:, :8], use_cache=True)
        rest = model(input_ids=ids[:, 8:], past_key_values=first.past_key_values).logits
    assert relative(behind, whole) < 1e-5
    assert relative(rest, whole[:, 8:]) < 1e-5


QUALITY = MLASettings(kv_budget=0.5, kv_bits="16")


@pytest.mark.parametrize(
    ("donor", "settings", "reason"),
    [
        ({}, QUALITY, "kv_lora_rank differs from layer to layer"),
        ({"family": "qwen2"}, QUALITY, "qwen2 blocks are not Llama's"),
        ({"attention_bias": True}, QUALITY, "kv_lora_rank differs from layer to layer"),
        ({"rope": YARN}, PORTABLE, "rope_type yarn"),
    ],
)
def test_what_would_be_lost_is_refused(
    tmp_path: Path, donor: dict[str, Any], settings: MLASettings, reason: str
) -> None:
    source = checkpoint(tmp_path / "tiny-mla", settings=settings, **donor)
    for to in deepseek_tensors.CLASSES:
        with pytest.raises(ExportError, match=f"{to} cannot hold this checkpoint: {reason}"):
            to_deepseek_v3.export_checkpoint(str(source), to, str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"attention_input_bias": True},
            "q_proj and kv_a_proj_with_mqa have biases, which the class would drop",
        ),
        ({"attention_output_bias": True}, "o_proj has a bias, which the class would drop"),
        ({"mlp_bias": True}, "the MLP has biases, which the class would drop"),
        ({"hidden_act": "gelu"}, "hidden_act=gelu, and engines take silu alone"),
        ({"qk_norm": "head"}, "qk_norm=head, which the class does not have"),
        ({"attention_softcap": 30.0}, "attention_softcap=30.0, which the class does not have"),
        ({"rope_in_latent": True}, "kv_b_proj reads the rotary key too"),
        ({"qk_nope_head_dim": [64, 48]}, "qk_nope_head_dim is not head_dim in every layer"),
        (
            {"rope_frequencies": [[0, 0] * 16, list(range(32))]},
            "layer 0 turns with frequencies that are no geometric",
        ),
    ],
)
def test_every_feature_that_a_class_lacks_is_named(plain: Path, changes: dict[str, Any], reason: str) -> None:
    config = ours(plain).config
    assert deepseek_tensors.refusal(config, "deepseek_v3") is None
    for name, value in changes.items():
        setattr(config, name, value)
    assert str(deepseek_tensors.refusal(config, "deepseek_v3")).startswith(reason)


def test_float16_is_refused(plain: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="float16 holds no numbers as small as the latent's norm needs"):
        to_deepseek_v3.export_checkpoint(str(plain), "deepseek_v3", str(tmp_path / "out"), dtype="float16")


def test_a_donor_is_no_checkpoint(tmp_path: Path) -> None:
    donor_model().save_pretrained(tmp_path / "donor")
    make_tokenizer().save_pretrained(tmp_path / "donor")
    with pytest.raises(
        ExportError, match="has no latent attention; youtu holds what --to mla --profile portable"
    ):
        to_deepseek_v3.export_checkpoint(str(tmp_path / "donor"), "youtu", str(tmp_path / "out"))


def test_a_mismatch_deletes_the_export(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fold that is wrong by a hundredth: found by the logits, and nothing stays."""
    true = deepseek_tensors.dense_attention

    def wrong(tensors: Any, shape: Any, fold: Any, order: Any) -> Any:
        made = true(tensors, shape, fold, order)
        return made | {"q_proj.weight": made["q_proj.weight"] * 1.01}

    monkeypatch.setattr(deepseek_tensors, "dense_attention", wrong)
    with pytest.raises(
        ProofError, match="the export is not what its checkpoint is, and was removed: .*logits differ"
    ):
        to_deepseek_v3.export_checkpoint(str(plain), "deepseek_v3", str(tmp_path / "out"), device="cpu")
    assert os.listdir(tmp_path) == []


def test_an_existing_folder_and_a_dry_run(plain: Path, tmp_path: Path) -> None:
    report = to_deepseek_v3.export_checkpoint(str(plain), "deepseek_v3", str(tmp_path / "out"), dry_run=True)
    assert [engine for engine, *_ in report["engines"]][:2] == [
        "transformers ≥ 5.16.1",
        "transformers < 5.16.1",
    ]
    assert not (tmp_path / "out").exists()
    to_deepseek_v3.export_checkpoint(
        str(plain), "deepseek_v3", str(tmp_path / "out"), device="cpu", verify=False
    )
    with pytest.raises(
        OutputError, match="out exists; choose another folder with -o, or replace it with --force"
    ):
        to_deepseek_v3.export_checkpoint(str(plain), "deepseek_v3", str(tmp_path / "out"))


def test_engines_by_sizes() -> None:
    def served(*sizes: int) -> dict[str, bool]:
        return {
            engine: yes
            for engine, yes, _ in engine_support.engines("deepseek_v3", engine_support.Sizes(*sizes))
        }

    assert served(512, 128, 64, 128)["vLLM 0.32 on GPUs"]
    assert served(512, 128, 64, 128)["vLLM 0.32 on CPUs"]
    for row in (320, 512):
        assert served(row - 64, 64, 64, 128)["vLLM 0.32 on GPUs"]
        assert not served(row - 64, 64, 64, 128)["vLLM 0.32 on CPUs"]
    small = served(128, 64, 64, 128)
    assert not small["vLLM 0.32 on GPUs"]
    assert not small["vLLM 0.32 on CPUs"]
    assert small["SGLang"]
    assert small["llama.cpp"]
    assert not served(512, 64, 64, 64)["vLLM 0.32 on GPUs"]
    youtu = engine_support.engines("youtu", engine_support.Sizes(512, 128, 64, 128))
    assert ("SGLang", False) in [(engine, yes) for engine, yes, _ in youtu]


def test_an_engines_reason_has_its_version_and_a_way_out() -> None:
    small = engine_support.engines("deepseek_v3", engine_support.Sizes(128, 64, 64, 128))
    whys = {engine: why for engine, _, why in small}
    assert whys["vLLM 0.32 on GPUs"] == (
        "its latent caches take kv_lora_rank + qk_rope_head_dim of 320, 512, 576, and this is 128 + 64 = 192; "
        "--pad-row 320 widens it with zeros"
    )
    engine_support.require(small, "llama.cpp")
    engine_support.require(small, "transformers")
    with pytest.raises(
        ExportError, match=r"vllm does not take this export: vLLM 0\.32 on GPUs: its latent caches"
    ):
        engine_support.require(small, "vllm")
    half = engine_support.Sizes(256, 64, 64, 128)
    whys = {engine: why for engine, _, why in engine_support.engines("youtu", half)}
    assert "its kernel takes kv_lora_rank 512" in whys["vLLM 0.32 on CPUs"]
    wide = engine_support.engines("own", engine_support.Sizes(512, 64, 64, 128), "float32")
    assert "--dtype bfloat16" in next(why for engine, _, why in wide if engine == "vLLM 0.32 on GPUs")
    with pytest.raises(ExportError, match="sglang does not take this export: SGLang: its fallback"):
        engine_support.require(wide, "sglang")


@pytest.mark.parametrize("to", ["deepseek_v3", "youtu", "own"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_padded_row_computes_the_same_and_says_what_it_costs(
    plain: Path, tmp_path: Path, to: str, dtype: str
) -> None:
    """The bare process that proves each export measures the padded cache too."""
    options = forms.Options(str(tmp_path / "out"), dtype=dtype, pad_row=320, engine="vllm", device="cpu")
    report = forms.export_checkpoint(str(plain), to, options)
    assert report["verified"]["cache"]["elements_per_token"] == 2 * 320 == report["kv_elements_per_token"]
    width = {"float32": 4, "bfloat16": 2}[dtype]
    assert report["padded_row"] == {
        "row": {"from": 160, "to": 320},
        "kv_bytes_per_token": {"from": 2 * 160 * width, "to": 2 * 320 * width, "donor": 2 * 256 * width},
    }
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["kv_lora_rank"], config["qk_rope_head_dim"]) == (320 - 64, 64)
    assert to == "deepseek_v3" or config["head_dim"] == 320
    if dtype == "float32":
        ids = token_ids(3, 40, seed=7)
        made = loaded(tmp_path / "out") if to != "own" else ours(tmp_path / "out")
        assert relative(logits(made, ids), logits(ours(plain), ids)) < 2e-5


# Of mlx-lm's ModelArgs of DeepSeek-V3, the fields of a dense model with their defaults, which are another model's.
MLX_FIELDS: dict[str, Any] = {
    **{"vocab_size": 102400, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 30},
    **{"num_attention_heads": 32, "kv_lora_rank": 512, "q_lora_rank": 1536, "qk_rope_head_dim": 64},
    **{
        "v_head_dim": 128,
        "qk_nope_head_dim": 128,
        "first_k_dense_replace": 0,
        "max_position_embeddings": 2048,
    },
    **{"rms_norm_eps": 1e-6, "rope_theta": 10000.0, "rope_scaling": None, "attention_bias": False},
}


def test_what_mlx_reads_of_the_config_is_there_and_means_the_same(tmp_path: Path) -> None:
    """mlx-lm takes its own default for a key that is missing, such as a rope_theta of 10000, without a word."""
    rope = {"rope_type": "default", "rope_theta": 500000.0}
    source = checkpoint(tmp_path / "tiny-mla", rope=rope, head_dim=128, hidden=64)
    to_deepseek_v3.export_checkpoint(
        str(source), "deepseek_v3", str(tmp_path / "out"), device="cpu", verify=False
    )
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config.keys() >= MLX_FIELDS.keys()
    read, model = {key: config[key] for key in MLX_FIELDS}, AutoConfig.from_pretrained(tmp_path / "out")
    assert read["rope_theta"] == model.rope_parameters["rope_theta"] == pytest.approx(500000.0**0.5)
    assert (read["rope_scaling"], read["q_lora_rank"], read["attention_bias"]) == (None, None, False)
    assert read["first_k_dense_replace"] == read["num_hidden_layers"] == 2  # no layer has experts
    assert read["rms_norm_eps"] == 1e-6  # that of its norm of the latent, whatever this key says
    assert config["model_type"] == "deepseek_v3"
    stored = set(load_file(tmp_path / "out" / "model.safetensors"))
    assert "lm_head.weight" in stored  # it has no tied embeddings
    assert {name.split(".")[4] for name in stored if ".self_attn." in name} == {
        *("q_proj", "kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj", "o_proj")
    }
    # Those without a default in exllamav3, which loads the form and then rounds it to float16.
    needed = (
        "moe_intermediate_size",
        "n_routed_experts",
        "rms_norm_eps",
        "intermediate_size",
        "kv_lora_rank",
    )
    assert all(isinstance(config[key], (int, float)) for key in needed)
    assert config["hidden_act"] == "silu"


def test_engines_that_were_read_and_not_run_say_so() -> None:
    def why(to: str, layers: int) -> dict[str, tuple[bool, str]]:
        rows = engine_support.engines(to, engine_support.Sizes(512, 128, 64, 128, layers))
        return {str(engine): (bool(yes), str(how)) for engine, yes, how in rows}

    assert why("deepseek_v3", 61)["MLX"] == (
        True,
        "mlx-lm, as DeepSeek-V3; caches the latent (read in source)",
    )
    assert why("deepseek_v3", 62)["MLX"][0] is False
    assert "62 layers" in why("deepseek_v3", 62)["MLX"][1]
    assert why("deepseek_v3", 2)["exllamav3"][0] is False
    for to in ("own", "youtu"):
        assert why(to, 2)["MLX, exllamav3"] == (False, "does not know the class")


def test_a_padded_row_in_a_gguf(plain: Path, tmp_path: Path) -> None:
    options = forms.Options(
        str(tmp_path / "out.gguf"), kind="f32", pad_row=512, engine="llama.cpp", device="cpu"
    )
    report = forms.export_checkpoint(str(plain), "gguf", options)
    assert report["kv_bytes_per_token"] == 2 * 512 * 2 == report["padded_row"]["kv_bytes_per_token"]["to"]
    assert report["dense_form_verified"]["greedy_equal"]
    found = read_gguf_header(tmp_path / "out.gguf")
    assert found.hyperparameter("attention.kv_lora_rank") == 512 - 64


def test_rows_that_cannot_be_padded(plain: Path, tmp_path: Path) -> None:
    def export(to: str, **choices: Any) -> Any:
        options = forms.Options(str(tmp_path / "out"), device="cpu", **choices)
        return forms.export_checkpoint(str(plain), to, options)

    with pytest.raises(ExportError, match="pad_row=500 is none of the rows that engines take: 320, 512, 576"):
        export("own", pad_row=500)
    with pytest.raises(
        ExportError, match="no form holds .*deepseek_v3: vllm does not take.*own: vllm does not"
    ):
        export("auto", engine="vllm")
    with pytest.raises(
        ExportError, match=r"pad_row=320 is less than the row that the checkpoint has, 512 \+ 64 = 576"
    ):
        padded_row.padded_rank(512, 64, 320)
    assert padded_row.padded_rank(512, 64, 576) == 512
    with pytest.raises(ExportError, match="a gguf of deepseek2 is for llama.cpp, and vllm takes other forms"):
        forms.export_checkpoint(
            str(plain), "gguf", forms.Options(str(tmp_path / "out.gguf"), engine="vllm", device="cpu")
        )
    assert not list(tmp_path.iterdir())


def test_verify_names_what_it_compares_with(plain: Path, tmp_path: Path) -> None:
    to_deepseek_v3.export_checkpoint(str(plain), "youtu", str(tmp_path / "out"), device="cpu", verify=False)
    found = verify_folder.verify_folder(str(tmp_path / "out"))
    for exported, tolerance in (
        (
            {"to": "own", "dtype": "float32", "exact": False},
            same_outputs.TOLERANCE,
        ),  # of a bfloat16 checkpoint
        ({"to": "own", "dtype": "bfloat16", "exact": False}, same_outputs.ROUNDED),
        ({"to": "deepseek_v3", "dtype": "float32"}, same_outputs.TOLERANCE),
        ({"to": "deepseek_v3", "dtype": "bfloat16"}, same_outputs.ROUNDED),
    ):
        (tmp_path / "mhconvert.json").write_text(json.dumps({"exported": exported}))
        assert verify_folder._tolerance(tmp_path) == tolerance
    assert found["against"] == str(plain)
    assert found["relative_difference"] < 1e-4
    assert found["greedy_equal"]
    whole = make_checkpoint(tmp_path / "whole")
    assert verify_folder.verify_folder(str(whole))["against"] == str(whole)
    other = checkpoint(tmp_path / "other", seed=4)
    with pytest.raises(
        ProofError, match=r"out is not .*other: their logits differ by .* and 0.005 is allowed"
    ):
        verify_folder.verify_folder(str(tmp_path / "out"), against=str(other), tolerance=5e-3)
    assert verify_folder.verify_folder(str(tmp_path / "out"), against=str(other))["relative_difference"] > 0.1
    donor_model().save_pretrained(tmp_path / "donor")
    with pytest.raises(ExportError, match="does not say what it should compute; name a model with --against"):
        verify_folder.verify_folder(str(tmp_path / "donor"))
    with pytest.raises(CheckpointError, match="nowhere is no folder; verify takes"):
        verify_folder.verify_folder(str(tmp_path / "nowhere"))


def test_the_oldest_transformers_that_caches_latents(plain: Path, tmp_path: Path) -> None:
    """Opt-in: MHCONVERT_OLD_PYTHON names an interpreter with transformers 5.16.1."""
    python = os.environ.get("MHCONVERT_OLD_PYTHON")
    if not python:
        pytest.skip("MHCONVERT_OLD_PYTHON names no interpreter with an older transformers")
    for to in deepseek_tensors.CLASSES:
        to_deepseek_v3.export_checkpoint(str(plain), to, str(tmp_path / to), device="cpu", verify=False)
        found = verify_folder.verify_folder(str(tmp_path / to), python=python)
        assert found["transformers"] != __import__("transformers").__version__
        assert found["relative_difference"] < 1e-4
        assert found["cache"]["elements_per_token"] == 2 * (96 + 64)


def test_the_largest_latent_is_seen(plain: Path) -> None:
    model = ours(plain)
    expected = same_outputs.expect(model, make_tokenizer(), 0, lambda _: None)
    assert len(expected.latents) == 2
    largest = 0.0
    with torch.no_grad():
        states = model(input_ids=expected.rows, output_hidden_states=True).hidden_states[0]
        latent = model.model.layers[0].self_attn.kv_a_proj_with_mqa(
            model.model.layers[0].input_layernorm(states)
        )
        largest = latent[..., :96].square().mean(-1).max().item()
    assert expected.latents[0] == pytest.approx(largest, rel=1e-5)
