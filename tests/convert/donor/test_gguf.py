"""A GGUF donor equals what transformers makes of it where that is right, and says so where nobody can tell."""

import json
import os
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mhconvert.convert.donor import gguf_reader, wheel_download
from mhconvert.convert.donor.aliases import WHEEL_MODELS
from mhconvert.convert.donor.donor import open_donor
from mhconvert.convert.donor.gguf_entries import GGUFTensor
from mhconvert.convert.donor.gguf_reader import dequantise, read_gguf_header
from mhconvert.convert.donor.gguf_source import GGUFSource
from mhconvert.convert.open_model import of_model, open_model
from mhconvert.errors import CheckpointError, UnsupportedError
from tests.donors import TEXT, make_donor, make_gguf, make_tokenizer


@pytest.mark.parametrize("quantization", ["F32", "F16", "Q8_0", "Q4_0", "Q4_1", "Q5_1"])
@pytest.mark.parametrize(("tied", "kv_heads"), [(True, 2), (False, 4)])
def test_gguf_equals_the_loader_of_transformers(tmp_path, quantization, tied, kv_heads):
    file = make_gguf(tmp_path / "tiny.gguf", quantization=quantization, tied=tied, kv_heads=kv_heads)
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="tiny.gguf", dtype=torch.float32
    ).state_dict()
    source = GGUFSource(read_gguf_header(file))
    assert set(source.names()) == set(theirs) - ({"lm_head.weight"} if tied else set())
    for name in source.names():
        read = source.read(name)
        assert read.dtype == source.dtype(name) == torch.float32
        assert torch.equal(read, theirs[name]), name
        assert source.shape(name) == tuple(read.shape)
        assert source.nbytes(name) == read.numel() * 4


def test_gguf_metadata_equals_the_reader_of_gguf(tmp_path):
    file = make_gguf(tmp_path / "tiny.gguf", quantization="Q4_1")
    header, theirs = read_gguf_header(file), gguf.GGUFReader(file)
    for key, field in theirs.fields.items():
        if not key.startswith("GGUF."):
            ours, value = header.metadata[key], field.contents()
            assert ours == pytest.approx(value) if isinstance(value, float) else ours == value, key
    for tensor in theirs.tensors:
        ours = header.tensors[tensor.name]
        assert ours.offset == tensor.data_offset
        assert ours.shape == tuple(int(n) for n in reversed(tensor.shape))
        assert (ours.quantization, ours.nbytes) == (tensor.tensor_type, tensor.n_bytes)


def test_gguf_with_nan_names_the_tensor(tmp_path):
    file = make_gguf(tmp_path / "tiny.gguf")
    tensor = read_gguf_header(file).tensors["blk.1.ffn_up.weight"]
    with file.open("r+b") as stream:
        stream.seek(tensor.offset + 4)
        stream.write(np.float32("nan").tobytes())
    with pytest.raises(
        CheckpointError, match=r"tensor model\.layers\.1\.mlp\.up_proj\.weight in .* holds NaN values"
    ):
        GGUFSource(read_gguf_header(file)).read("model.layers.1.mlp.up_proj.weight")


@pytest.mark.parametrize("kept", [0, 3, 10, 200, 2000, -64])
def test_truncated_gguf(tmp_path, kept):
    file = make_gguf(tmp_path / "tiny.gguf")
    os.truncate(file, kept if kept >= 0 else file.stat().st_size + kept)
    with pytest.raises(CheckpointError, match=r"tiny\.gguf is (truncated|not a GGUF file)"):
        read_gguf_header(file)


def test_gguf_lengths_beyond_the_file_allocate_nothing(tmp_path):
    file = tmp_path / "liar.gguf"
    file.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1 << 60) + b"x" * 64)
    with pytest.raises(CheckpointError, match="is truncated or not a valid GGUF file"):
        read_gguf_header(file)


def test_gguf_version_is_named(tmp_path):
    file = tmp_path / "old.gguf"
    file.write_bytes(b"GGUF" + struct.pack("<IQQ", 1, 0, 0))
    with pytest.raises(CheckpointError, match="is GGUF version 1; 2 and 3"):
        read_gguf_header(file)


def test_gguf_of_another_architecture(tmp_path):
    file = make_gguf(tmp_path / "other.gguf", architecture="bloom")
    with pytest.raises(
        UnsupportedError,
        match=r"has GGUF architecture 'bloom'; GGUF donors can be: llama, qwen2, .*, gemma3,",
    ):
        GGUFSource(read_gguf_header(file))


def test_split_gguf_is_the_whole_one(tmp_path):
    whole = open_donor(str(make_gguf(tmp_path / "tiny.gguf")))
    make_gguf(tmp_path / "parts.gguf", part=9)
    files = sorted(tmp_path.glob("parts-*"))
    assert [file.name for file in files] == [f"parts-{n:05d}-of-00003.gguf" for n in (1, 2, 3)]
    for file in files:  # any part will do
        donor = open_donor(str(file))
        assert (donor.name, donor.location) == ("parts", str(files[0]))
        assert donor.config.to_dict() == whole.config.to_dict()
        assert sorted(donor.source.names()) == sorted(whole.source.names())
        assert all(torch.equal(donor.source.read(n), whole.source.read(n)) for n in whole.source.names())
        assert donor.tokenizer()("at 95 degrees").input_ids == whole.tokenizer()("at 95 degrees").input_ids
    fingerprint = of_model(open_model(str(files[0])))
    with files[2].open("r+b") as stream:
        stream.seek(-4, os.SEEK_END)
        stream.write(b"\0\0\0\0")
    assert of_model(open_model(str(files[1]))) != fingerprint
    files[1].unlink()
    with pytest.raises(CheckpointError, match=r"part 2 of 3 of .* is missing: parts-00002-of-00003\.gguf"):
        open_donor(str(files[0]))
    files[0].rename(tmp_path / "renamed.gguf")
    with pytest.raises(CheckpointError, match=r"is one of 3 parts; name all as published, .*00001-of-00003"):
        open_donor(str(tmp_path / "renamed.gguf"))


FORMATS = sorted({*gguf.quants._type_traits, gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16})


@pytest.mark.parametrize("kind", FORMATS, ids=lambda kind: kind.name)
def test_every_format_that_gguf_dequantises(tmp_path, monkeypatch, kind):
    """Random bytes in blocks give the same numbers, NaN included, block by block as all at once."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    raw = np.random.default_rng(0).integers(0, 256, (64, 4 * size), dtype=np.uint8)
    entry = GGUFTensor("w", (64, 4 * block), kind, 3, tmp_path / "raw")
    (tmp_path / "raw").write_bytes(b"xyz" + raw.tobytes())
    plain = {"F32": "<f4", "F16": "<f2"}.get(kind.name)
    monkeypatch.setattr(gguf_reader, "BLOCK", 8 * block)
    with np.errstate(all="ignore"):
        whole = raw.view(plain).astype(np.float32) if plain else gguf.dequantize(raw, kind)
        read = dequantise(entry)
    np.testing.assert_array_equal(read.numpy(), whole.reshape(64, 4 * block))


def test_a_format_that_gguf_cannot_dequantise(tmp_path):
    file = make_gguf(tmp_path / "tiny.gguf", tensors={"extra.weight": np.zeros(8)})
    with pytest.raises(UnsupportedError, match=r"stores extra\.weight as F64, which cannot be read"):
        open_donor(str(file))


def test_gguf_without_a_fact_names_it(tmp_path):
    file = make_gguf(tmp_path / "tiny.gguf", facts={"llama.expert_count": 8})
    with pytest.raises(
        CheckpointError, match=r"tiny\.gguf does not state 'llama\.expert_used_count'; use another"
    ):
        open_donor(str(file))


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        (
            {"llama.attn_logit_softcapping": 30.0},
            r"llama\.attn_logit_softcapping = 30\.0, for which llama has no place",
        ),
        (
            {"llama.attention.head_count_kv": [1, 2]},
            r"llama\.attention\.head_count_kv = \[1, 2\], for which llama has no place",
        ),
    ],
)
def test_gguf_with_a_fact_that_its_model_cannot_have(tmp_path, facts, words):
    file = make_gguf(tmp_path / "tiny.gguf", facts=facts)
    with pytest.raises(UnsupportedError, match=f"states {words}"):
        open_donor(str(file))


def test_gguf_with_a_fact_that_no_model_can_have(tmp_path):
    file = make_gguf(tmp_path / "tiny.gguf", facts={"llama.context_length": "long"})
    with pytest.raises(CheckpointError, match=r"llama\.context_length=\"long\" is not a whole number"):
        open_donor(str(file))


def test_surplus_tensor_keeps_its_name(tmp_path):
    file = make_gguf(tmp_path / "tiny.gguf", tensors={"blk.0.attn_sinks.weight": np.zeros(4, np.float32)})
    assert "blk.0.attn_sinks.weight" in GGUFSource(read_gguf_header(file)).names()


def test_gguf_files_are_made_from_its_metadata(tmp_path):
    file, out = make_gguf(tmp_path / "tiny.gguf"), tmp_path / "out"
    out.mkdir()
    donor = open_donor(str(file))
    donor.copy_files(out)
    expected, again = make_tokenizer(), AutoTokenizer.from_pretrained(out)
    for text in (TEXT, "  two  12  spaces\n\n\tñ 🙂 <|eos|> x"):
        assert donor.tokenizer()(text).input_ids == again(text).input_ids == expected(text).input_ids
        assert again.decode(again(text).input_ids) == text
    assert (again.bos_token_id, again.eos_token_id, again.pad_token_id) == (0, 1, 1)
    assert again.chat_template == expected.chat_template
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == 1
    assert (donor.name, donor.dtype) == ("tiny", torch.float32)
    assert getattr(donor.config, "quantization_config", None) is None


def test_every_token_that_ends_an_answer(tmp_path):
    facts = {"tokenizer.ggml.eot_token_id": 5, "tokenizer.ggml.eom_token_id": 1}
    donor = open_donor(str(make_gguf(tmp_path / "tiny.gguf", facts=facts)))
    assert donor.generation_config().eos_token_id == [1, 5]
    assert (donor.config.eos_token_id, donor.tokenizer().eos_token_id) == (1, 1)


def test_gguf_llama3_scaling_is_recognised(tmp_path):
    divisors = torch.tensor([1.0] * 4 + [2.0, 8.0, 8.0, 8.0])
    with pytest.raises(UnsupportedError, match="carries RoPE factors"):
        open_donor(str(make_gguf(tmp_path / "odd.gguf", tensors={"rope_freqs.weight": divisors.numpy()})))
    rope = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0}
    rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    scaled = open_donor(str(make_donor(tmp_path / "scaled", rope=rope))).rotary("cpu").inv_freq
    plain = open_donor(str(make_donor(tmp_path / "plain"))).rotary("cpu").inv_freq
    file = make_gguf(tmp_path / "llama3.gguf", tensors={"rope_freqs.weight": (plain / scaled).numpy()})
    donor = open_donor(str(file))
    assert donor.config.rope_parameters == rope
    assert "rope_freqs.weight" not in donor.source.names()


def test_gguf_linear_scaling(tmp_path):
    facts = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2}
    donor = open_donor(str(make_gguf(tmp_path / "tiny.gguf", facts=facts)))
    assert donor.config.rope_parameters == {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}


def test_gguf_yarn(tmp_path):
    facts = {f"qwen2.rope.scaling.{key}": value for key, value in YARN_FACTS.items()}
    donor = open_donor(str(make_gguf(tmp_path / "tiny.gguf", family="qwen2", facts=facts)))
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "beta_fast": 16.0}
    assert donor.config.rope_parameters == {"rope_theta": 10000.0} | yarn
    source = open_donor(str(make_donor(tmp_path / "source", family="qwen2", rope=yarn)))
    assert torch.equal(donor.rotary("cpu").inv_freq, source.rotary("cpu").inv_freq)


YARN_FACTS = {"type": "yarn", "factor": 4.0, "original_context_length": 128, "yarn_beta_fast": 16.0}


def test_gguf_longrope(tmp_path):
    short, long = (np.linspace(1, top, 8, dtype=np.float32) for top in (1.5, 8))
    tensors = {"rope_factors_short.weight": short, "rope_factors_long.weight": long}
    facts = {"phi3.rope.scaling.original_context_length": 64, "phi3.rope.scaling.attn_factor": 1.25}
    file = make_gguf(tmp_path / "tiny.gguf", family="phi3", facts=facts, tensors=tensors, pad_token_id=1)
    donor = open_donor(str(file))
    assert donor.config.rope_parameters == {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 1.0,
        "short_factor": short.tolist(),
        "long_factor": long.tolist(),
        "original_max_position_embeddings": 64,
        "attention_factor": 1.25,
    }
    assert donor.config.original_max_position_embeddings == 64
    assert not {"rope_factors_short.weight", "rope_factors_long.weight"} & set(donor.source.names())
    rotary = donor.rotary("cpu")
    plain = 10000.0 ** -(torch.arange(0, 16, 2) / 16)
    cos, _ = rotary(torch.zeros(1), torch.tensor([[5]]))
    expected = torch.cos(5 * plain / torch.tensor(short)) * 1.25
    torch.testing.assert_close(cos[0, 0, :8], expected)


@pytest.mark.parametrize("scaling", ["yarn", "longrope", "dynamic"])
def test_gguf_scaling_that_is_not_stated_in_full(tmp_path, scaling):
    file = make_gguf(tmp_path / "tiny.gguf", facts={"llama.rope.scaling.type": scaling})
    with pytest.raises(
        UnsupportedError, match=rf"scales RoPE by '{scaling}', .* use the model's safetensors folder"
    ):
        open_donor(str(file))


SMOLLM2 = wheel_download.cache_folder() / Path(WHEEL_MODELS["smollm2-135m"].member).name
# Real files: those that the variable lists, else the embedded SmolLM2 where an earlier run left it in the cache.
REAL = [Path(name) for name in os.environ.get("MHCONVERT_TEST_GGUF", str(SMOLLM2)).split(os.pathsep)]


@pytest.mark.parametrize("path", REAL, ids=lambda path: path.stem)
def test_real_file_equals_the_loader_of_transformers(path):
    if not path.is_file():
        pytest.skip(f"{path.name} is not in the cache (make demo puts SmolLM2 there)")
    theirs = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    weights = theirs.state_dict()
    donor = open_donor(str(path))
    tied = {"lm_head.weight"} if donor.config.tie_word_embeddings else set()
    assert set(donor.source.names()) == set(weights) - tied
    assert all(torch.equal(donor.source.read(name), weights[name]) for name in donor.source.names())
    tokenizer = donor.tokenizer()
    text = "It's 1234 o'clock,  42 times.\n\n  def f(x):\n\treturn x <|im_start|>user\nhi<|im_end|>\n héllo 日本語 🙂"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer.convert_ids_to_tokens(tokenizer("  42").input_ids)[-2:] == ["4", "2"]
    assert "<|im_start|>" in tokenizer.tokenize(text)
    assert tokenizer.eos_token == "<|im_end|>"
    assert donor.generation_config().eos_token_id == tokenizer.eos_token_id
