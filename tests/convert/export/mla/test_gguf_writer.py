"""The GGUF export is the checkpoint: value by value, and as llama.cpp's graph computes it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from mhconvert.convert.donor.gguf_pre_tokenizers import PRE_TOKENIZERS
from mhconvert.convert.donor.gguf_reader import read_gguf_header
from mhconvert.convert.donor.gguf_tokenizer import gguf_tokenizer
from mhconvert.convert.export.mla import gguf_writer
from mhconvert.convert.export.mla.gguf_tensors import balanced
from mhconvert.errors import CheckpointError, ExportError, OutputError
from tests.convert.export import deepseek2
from tests.donors import CHAT_TEMPLATE, TEXT

WRITTEN = ("gpt-2", "smollm", "llama-bpe", "smaug-bpe", "qwen2", "qwen35", "tekken", "gpt-4o")
IDS = torch.randint(0, 320, (48,), generator=torch.Generator().manual_seed(7)).tolist()
TEXTS = [
    TEXT,
    "It's 1234567 o'clock, I'LL be 42.\n\n  def f(x):\n\treturn x\r\n   ",
    " héllo HÉLLO Wörld 日本語 🙂 нещо ½",
    "",
]
HUB_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa",
    "attn_kv_a_norm": "self_attn.kv_a_layernorm",
    "attn_norm": "input_layernorm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
BALANCED = ("attn_q", "attn_kv_a_mqa", "attn_kv_a_norm", "attn_norm")


@pytest.fixture
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return deepseek2.make_dense(tmp_path_factory.mktemp("dense") / "tiny")


def test_every_tensor_of_an_ordinary_checkpoint_is_the_source(tmp_path: Path) -> None:
    dense = deepseek2.make_dense(tmp_path / "plain", scale=None)
    report = gguf_writer.write(dense, tmp_path / "tiny.gguf", "f32")
    found, weights = deepseek2.stored(tmp_path / "tiny.gguf"), load_file(dense / "model.safetensors")
    assert report["tensors"] == {"F32": len(found)} == {"F32": 3 + 3 * 11}
    assert report["bytes"] == (tmp_path / "tiny.gguf").stat().st_size
    assert torch.equal(found.pop("token_embd.weight"), weights.pop("model.embed_tokens.weight"))
    assert torch.equal(found.pop("output_norm.weight"), weights.pop("model.norm.weight"))
    assert torch.equal(found.pop("output.weight"), weights.pop("lm_head.weight"))
    for layer in range(3):
        hub, ours = f"model.layers.{layer}.", f"blk.{layer}."
        for name, theirs in HUB_NAMES.items():
            assert torch.equal(found.pop(f"{ours}{name}.weight"), weights.pop(f"{hub}{theirs}.weight")), name
        parts = found.pop(f"{ours}attn_k_b.weight").transpose(1, 2), found.pop(f"{ours}attn_v_b.weight")
        assert torch.equal(torch.cat(parts, 1).flatten(0, 1), weights.pop(f"{hub}self_attn.kv_b_proj.weight"))
    assert not found
    assert not weights


def test_balancing_moves_powers_of_two_alone(dense: Path, tmp_path: Path) -> None:
    gguf_writer.write(dense, tmp_path / "tiny.gguf", "f32")
    found, weights = deepseek2.stored(tmp_path / "tiny.gguf"), load_file(dense / "model.safetensors")
    for layer in range(3):
        before = {name: weights[f"model.layers.{layer}.{HUB_NAMES[name]}.weight"] for name in BALANCED}
        after = {name: found[f"blk.{layer}.{name}.weight"] for name in BALANCED}
        lift = (before["attn_norm"] / after["attn_norm"]).unique()
        gain = (before["attn_kv_a_norm"] / after["attn_kv_a_norm"]).unique()
        assert lift.log2().frac() == gain.log2().frac() == 0
        assert lift > 1
        assert gain > 1
        assert torch.equal(after["attn_q"], before["attn_q"] * lift)
        assert torch.equal(after["attn_kv_a_mqa"][:32], before["attn_kv_a_mqa"][:32] * lift * gain)
        assert torch.equal(after["attn_kv_a_mqa"][32:], before["attn_kv_a_mqa"][32:] * lift)
        assert 2.0**-17 < after["attn_kv_a_mqa"][:32].square().mean().sqrt() < 2.0**-14


def test_the_worst_input_still_passes_the_norm_unchanged() -> None:
    """The bound on the latent is tight: an input along the rows' largest direction."""
    generator = torch.Generator().manual_seed(0)
    norm, query = 1 + 0.1 * torch.randn(64, generator=generator), torch.ones(8, 64)
    reads = torch.randn(40, 64, generator=generator)
    reads[:32] *= 2.0**-29
    latent_norm = torch.full((32,), 1e-3 * 2.0**29)
    new_norm, _, new_reads, new_latent = (
        tensor.double() for tensor in balanced(norm, query, reads, latent_norm)
    )
    direction = torch.linalg.svd(reads[:32].double() * norm.double()).Vh[0] * 64**0.5
    exact = reads[:32].double() @ (norm.double() * direction) * 2.0**29
    latent = new_reads[:32] @ (new_norm * direction)
    made = latent * (latent.square().mean() + 1e-6).rsqrt() * new_latent
    error = float(((made - exact) / exact).abs().max())
    assert 2.0**-18 < error < 2.0**-14


def test_kv_b_in_two_parts_is_absorbed_attention(dense: Path, tmp_path: Path) -> None:
    gguf_writer.write(dense, tmp_path / "tiny.gguf", "f32")
    found, weights = deepseek2.stored(tmp_path / "tiny.gguf"), load_file(dense / "model.safetensors")
    up = weights["model.layers.1.self_attn.kv_b_proj.weight"].unflatten(0, (4, 96)).double()
    latent, query = torch.randn(5, 32).double(), torch.randn(4, 32).double()
    expanded = torch.einsum("hn,hnr,tr->ht", query, up[:, :32], latent)
    absorbed = torch.einsum("hn,hrn,tr->ht", query, found["blk.1.attn_k_b.weight"].double(), latent)
    assert torch.allclose(expanded, absorbed, rtol=1e-12)
    values = torch.einsum("hvr,tr->thv", found["blk.1.attn_v_b.weight"].double(), latent)
    assert torch.allclose(values, torch.einsum("hvr,tr->thv", up[:, 32:], latent), rtol=1e-12)


@pytest.mark.parametrize(
    ("kind", "bound"),
    [
        ("f32", 1e-4),
        ("f16", 5e-3),
        ("bf16", 4e-2),
        ("q8_0", 6e-2),
    ],  # roundings of the kind, over three layers
)
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("scale", [2.0**-29, 2.0**-20, 2.0**-15, None])  # of 2^-15 nothing can be given back
def test_it_computes_what_transformers_computes(
    tmp_path: Path, kind: str, bound: float, half: bool, scale: float | None
) -> None:
    dense = deepseek2.make_dense(tmp_path / "tiny", scale=scale)
    expected = _transformers_logits(dense, IDS)
    gguf_writer.write(dense, tmp_path / "tiny.gguf", kind)
    made = deepseek2.logits(tmp_path / "tiny.gguf", IDS, half=half)
    assert _relative(made, expected) < bound + half * 1e-2


def test_a_bfloat16_checkpoint_loses_nothing(tmp_path: Path) -> None:
    dense = deepseek2.make_dense(tmp_path / "tiny", dtype=torch.bfloat16)
    gguf_writer.write(dense, tmp_path / "tiny.gguf", "bf16")
    found, weights = deepseek2.stored(tmp_path / "tiny.gguf"), load_file(dense / "model.safetensors")
    assert weights["lm_head.weight"].dtype == torch.bfloat16
    for layer in range(3):
        hub, ours = f"model.layers.{layer}.", f"blk.{layer}."
        lift = (weights[f"{hub}input_layernorm.weight"] / found[f"{ours}attn_norm.weight"]).unique()
        assert torch.equal(
            found[f"{ours}attn_q.weight"] / lift, weights[f"{hub}self_attn.q_proj.weight"].float()
        )
        for name in ("ffn_down", "ffn_norm", "attn_output"):
            assert torch.equal(
                found[f"{ours}{name}.weight"], weights[f"{hub}{HUB_NAMES[name]}.weight"].float()
            )


@pytest.mark.parametrize(("kind", "types"), [("f16", "F16"), ("bf16", "BF16"), ("q8_0", "Q8_0")])
def test_what_stays_in_f32(dense: Path, tmp_path: Path, kind: str, types: str) -> None:
    report = gguf_writer.write(dense, tmp_path / "tiny.gguf", kind)
    wide = {"blk.0.attn_kv_a_mqa.weight", "blk.0.attn_norm.weight", "blk.0.attn_kv_a_norm.weight"}
    wide |= {"blk.0.ffn_norm.weight", "output_norm.weight"}
    tensors = [
        t
        for t in gguf.GGUFReader(tmp_path / "tiny.gguf").tensors
        if not t.name.startswith(("blk.1", "blk.2"))
    ]
    assert {t.name for t in tensors if t.tensor_type.name == "F32"} == wide
    assert {t.tensor_type.name for t in tensors} == {"F32", types}
    assert report["tensors"] == {"F32": 1 + 3 * 4, types: 2 + 3 * 7}


def test_q8_0_is_within_half_a_step_and_odd_rows_are_f16(tmp_path: Path) -> None:
    dense = deepseek2.make_dense(tmp_path / "tiny", qk_nope_head_dim=48, scale=None)
    report = gguf_writer.write(dense, tmp_path / "tiny.gguf", "q8_0")
    assert report["tensors"]["F16"] == 3  # attn_k_b, whose rows of 48 are no blocks of 32
    weight = load_file(dense / "model.safetensors")["model.layers.2.mlp.down_proj.weight"].unflatten(
        1, (-1, 32)
    )
    error = (deepseek2.stored(tmp_path / "tiny.gguf")["blk.2.ffn_down.weight"].view_as(weight) - weight).abs()
    step = weight.abs().amax(-1, keepdim=True) / 127
    assert bool((error <= step * (0.5 + 127 * 2.0**-11)).all())  # and the step is rounded to half precision


def test_facts(dense: Path, tmp_path: Path) -> None:
    file = tmp_path / "tiny.gguf"
    gguf_writer.write(dense, file, "q8_0")
    expected: dict[str, Any] = {
        ".general.architecture": "deepseek2",
        ".general.file_type": 7,
        ".general.quantization_version": 2,
        "block_count": 3,
        "leading_dense_block_count": 3,
        "attention.q_lora_rank": 0,
        "attention.kv_lora_rank": 32,
        "attention.head_count": 4,
        "attention.head_count_kv": 1,
        "attention.key_length": 48,
        "attention.value_length": 32,
        "attention.key_length_mla": 48,
        "attention.value_length_mla": 64,
        "rope.dimension_count": 16,
        "rope.freq_base": 10000.0,
        "expert_shared_count": 0,
        "expert_feed_forward_length": 96,
        "feed_forward_length": 96,
        "context_length": 512,
        "vocab_size": 320,
        "attention.layer_norm_rms_epsilon": pytest.approx(1e-6),
    }
    assert {key: deepseek2.fact(file, key) for key in expected} == expected
    assert "deepseek2.expert_count" not in gguf.GGUFReader(file).fields


def test_tied_embeddings_are_written_once(tmp_path: Path) -> None:
    dense = deepseek2.make_dense(tmp_path / "tiny", tie_word_embeddings=True)
    gguf_writer.write(dense, tmp_path / "tiny.gguf", "f32")
    assert "output.weight" not in deepseek2.stored(tmp_path / "tiny.gguf")
    made = deepseek2.logits(tmp_path / "tiny.gguf", IDS)
    assert _relative(made, _transformers_logits(dense, IDS)) < 1e-4


def test_tokenizer(dense: Path, tmp_path: Path) -> None:
    file = tmp_path / "tiny.gguf"
    gguf_writer.write(dense, file)
    tokenizer = AutoTokenizer.from_pretrained(dense)
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens, kinds = (deepseek2.fact(file, f".tokenizer.ggml.{key}") for key in ("tokens", "token_type"))
    assert tokens[: len(tokenizer)] == tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    assert tokens[len(tokenizer) :] == [f"[PAD{index}]" for index in range(len(tokenizer), 320)]
    assert kinds == [3, 3] + [1] * (len(tokenizer) - 2) + [5] * (320 - len(tokenizer))
    merges = [" ".join(pair) for pair in model["merges"]]
    assert deepseek2.fact(file, ".tokenizer.ggml.merges") == merges
    facts = {"pre": "gpt-2", "model": "gpt2", "bos_token_id": 0, "eos_token_id": 1, "padding_token_id": 1}
    facts |= {"add_bos_token": False, "add_eos_token": False}
    assert {key: deepseek2.fact(file, f".tokenizer.ggml.{key}") for key in facts} == facts
    assert deepseek2.fact(file, ".tokenizer.chat_template") == CHAT_TEMPLATE


def test_every_end_of_an_answer_is_written(dense: Path, tmp_path: Path) -> None:
    """Two beside the tokenizer's own have keys in a GGUF; the others are said."""
    file = tmp_path / "tiny.gguf"
    (dense / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 1, 9, 11]}))
    made = gguf_writer.write(dense, file)
    ends = {key: deepseek2.fact(file, f".tokenizer.ggml.{key}_token_id") for key in ("eos", "eot", "eom")}
    assert ends == {"eos": 1, "eot": 7, "eom": 9}
    assert made["skipped"] == ["that token 11 ends an answer"]


@pytest.mark.parametrize("pre", WRITTEN)
def test_pre_tokenizers_have_their_names(dense: Path, tmp_path: Path, pre: str) -> None:
    tokenizer = save_tokenizer(dense, pre)
    file = tmp_path / "tiny.gguf"
    gguf_writer.write(dense, file, "q8_0")
    assert deepseek2.fact(file, ".tokenizer.ggml.pre") == pre
    assert deepseek2.fact(file, ".tokenizer.ggml.add_bos_token") is True
    again = gguf_tokenizer(read_gguf_header(file))
    assert [again(text).input_ids for text in TEXTS] == [tokenizer(text).input_ids for text in TEXTS]


def test_split_by_removal_of_nothing_is_the_same(dense: Path, tmp_path: Path) -> None:
    save_tokenizer(dense, "llama-bpe")
    content = json.loads((dense / "tokenizer.json").read_text())
    content["pre_tokenizer"]["pretokenizers"][0] |= {"behavior": "Removed", "invert": True}
    (dense / "tokenizer.json").write_text(json.dumps(content))
    gguf_writer.write(dense, tmp_path / "tiny.gguf")
    assert deepseek2.fact(tmp_path / "tiny.gguf", ".tokenizer.ggml.pre") == "llama-bpe"


def test_what_llama_cpp_does_not_do_of_a_tokenizer_is_said(dense: Path, tmp_path: Path) -> None:
    tokenizer = save_tokenizer(dense, "qwen2")
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    tokenizer.save_pretrained(dense)
    report = gguf_writer.write(dense, tmp_path / "tiny.gguf")
    assert report["skipped"] == ["NFC normalisation of text"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: setattr(t, "normalizer", normalizers.Lowercase()), "it normalises text by Lowercase"),
        (
            lambda t: setattr(t, "pre_tokenizer", pre_tokenizers.Whitespace()),
            r"cuts text by Whitespace \(ignore_merges=False\), which is none of llama\.cpp's .* gpt-2, olmo, smollm",
        ),
        (
            lambda t: setattr(t, "pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=True)),
            "cuts text by ByteLevel use_regex=True prefix",
        ),
        (lambda t: t.add_tokens([f"<{n}>" for n in range(100)]), "tokens and the model 320"),
        (
            lambda t: setattr(
                t,
                "post_processor",
                processors.TemplateProcessing(single="$A <|bos|>", special_tokens=[("<|bos|>", 0)]),
            ),
            "adds tokens other than bos and eos to a text",
        ),
    ],
)
def test_tokenizers_that_are_refused(dense: Path, tmp_path: Path, change: Any, words: str) -> None:
    tokenizer = save_tokenizer(dense, "gpt-2")
    change(tokenizer.backend_tokenizer)
    tokenizer.save_pretrained(dense)
    with pytest.raises(ExportError, match=words):
        gguf_writer.write(dense, tmp_path / "tiny.gguf")
    assert not list(tmp_path.iterdir())


def test_a_sentencepiece_tokenizer_is_refused(dense: Path, tmp_path: Path) -> None:
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, "a": 3}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(
        dense
    )
    with pytest.raises(ExportError, match="it is BPE with byte fallback; byte-level BPE alone is written"):
        gguf_writer.write(dense, tmp_path / "tiny.gguf")


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (
            {"model_type": "youtu"},
            r"its model_type is youtu, not deepseek_v3 \(export it to deepseek_v3 first\)",
        ),
        (
            {"first_k_dense_replace": 1},
            "first_k_dense_replace=1 of 3 layers; the others are mixtures of experts",
        ),
        ({"q_lora_rank": 64}, "q_lora_rank=64; queries must come from one q_proj"),
        ({"attention_bias": True}, "its attention has biases, which deepseek2 would drop"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "RoPE is scaled by 'yarn'"),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, "RoPE is scaled by 'linear'"),
        ({"rope_interleave": False}, "rope_interleave is false"),
        ({"rms_norm_eps": 1e-5}, r"rms_norm_eps=1e-05, and llama\.cpp takes it for the latent's norm too"),
        ({"hidden_act": "gelu"}, "hidden_act=gelu; deepseek2's is silu"),
        ({"quantization_config": {"quant_method": "fp8"}}, "its weights are quantised"),
        ({"kv_lora_rank": None}, "lacks a size"),
        ({"v_head_dim": 32}, r"kv_b_proj\.weight is \[384, 32\], not \[256, 32\] as config\.json has it"),
        ({"num_hidden_layers": 2}, r"deepseek2 has no place for model\.layers\.2\."),
        ({"num_hidden_layers": 4, "first_k_dense_replace": 4}, r"it has no model\.layers\.3\."),
    ],
)
def test_checkpoints_that_are_refused(tmp_path: Path, config: dict[str, Any], words: str) -> None:
    dense, target = deepseek2.make_dense(tmp_path / "tiny"), tmp_path / "out" / "tiny.gguf"
    content = json.loads((dense / "config.json").read_text()) | config
    (dense / "config.json").write_text(json.dumps(content))
    with pytest.raises(ExportError, match=words):
        gguf_writer.write(dense, target)
    assert not target.parent.exists()


def test_a_bias_is_named(tmp_path: Path) -> None:
    dense = deepseek2.make_dense(tmp_path / "tiny")
    weights = load_file(dense / "model.safetensors")
    weights["model.layers.0.self_attn.o_proj.bias"] = torch.zeros(64)
    save_file(weights, dense / "model.safetensors", {"format": "pt"})
    with pytest.raises(ExportError, match=r"no place for a bias, model\.layers\.0\.self_attn\.o_proj\.bias"):
        gguf_writer.write(dense, tmp_path / "tiny.gguf")


def test_f16_refuses_what_it_cannot_hold(tmp_path: Path) -> None:
    dense, file = deepseek2.make_dense(tmp_path / "tiny"), tmp_path / "tiny.gguf"
    weights = load_file(dense / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][0, 0] = 1e5
    save_file(weights, dense / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        ExportError, match=r"blk\.0\.ffn_up\.weight holds values beyond F16; choose kind bf16"
    ):
        gguf_writer.write(dense, file, "f16")
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]
    gguf_writer.write(dense, file, "bf16")


def test_folders_and_kinds_that_are_none(dense: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"'q4_0' is no kind of GGUF; choose one of f32, f16, bf16, q8_0"):
        gguf_writer.write(dense, tmp_path / "tiny.gguf", "q4_0")
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read"):
        gguf_writer.write(tmp_path, tmp_path / "tiny.gguf")
    with pytest.raises(OutputError, match="is a folder; name a .gguf file"):
        gguf_writer.write(dense, tmp_path)
    bare = deepseek2.make_dense(tmp_path / "bare")
    (bare / "tokenizer.json").unlink()
    with pytest.raises(ExportError, match=r"has no tokenizer\.json, and a GGUF file holds its tokenizer"):
        gguf_writer.write(bare, tmp_path / "tiny.gguf")


def test_an_existing_target_is_replaced_by_force_alone(dense: Path, tmp_path: Path) -> None:
    file = tmp_path / "tiny.gguf"
    file.write_text("mine")
    with pytest.raises(OutputError, match="exists; choose another file with -o, or replace it with --force"):
        gguf_writer.write(dense, file)
    assert file.read_text() == "mine"
    gguf_writer.write(dense, file, force=True)
    assert read_gguf_header(file).architecture == "deepseek2"
    file.unlink()
    partial = tmp_path / "tiny.gguf.partial"
    partial.write_text("cut short")
    with pytest.raises(OutputError, match=r"tiny\.gguf\.partial is there already"):
        gguf_writer.write(dense, file)
    gguf_writer.write(dense, file, force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.gguf"]


def test_a_full_disk(dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        with open("/dev/full", "wb", buffering=0) as full:
            np.zeros(1 << 16, dtype=np.uint8).tofile(full)

    file = tmp_path / "tiny.gguf"
    file.write_text("mine")
    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", fails)
    with pytest.raises(OutputError, match="cannot be written: the disk is full; make room"):
        gguf_writer.write(dense, file, force=True)
    assert file.read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.gguf"]
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(OutputError, match="the disk of .* has .* free and the conversion needs"):
        gguf_writer.write(dense, file, force=True)


def test_progress_counts_tensors(dense: Path, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    gguf_writer.write(
        dense, tmp_path / "tiny.gguf", on_progress=lambda p: seen.append((p.stage, p.done, p.total))
    )
    assert seen == [("export", done, 36) for done in range(1, 37)]


def _transformers_logits(dense: Path, ids: list[int]) -> np.ndarray:
    model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32).eval()
    with torch.no_grad():
        found: np.ndarray = model(torch.tensor([ids])).logits[0].numpy()
    return found


def _relative(made: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(made - expected) / np.linalg.norm(expected))


def save_tokenizer(folder: Path, pre: str) -> Any:
    """A tokenizer trained on TEXT that cuts as `pre` does and starts a text with <|bos|>, saved in `folder`."""
    known = PRE_TOKENIZERS[pre]
    tokenizer = Tokenizer(models.BPE(ignore_merges=known.ignore_merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(known.steps)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|bos|>", "<|eos|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", special_tokens=[("<|bos|>", 0)]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|bos|>", eos_token="<|eos|>")
    fast.save_pretrained(folder)
    return fast
