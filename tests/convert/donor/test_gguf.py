"""A GGUF donor equals what transformers makes of it where that is right, and says so where nobody can tell."""

import json
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mhconvert.convert.donor import wheel_download
from mhconvert.convert.donor.aliases import WHEEL_MODELS
from mhconvert.convert.donor.donor import open_donor
from mhconvert.convert.donor.gguf_reader import read_gguf_header
from mhconvert.convert.donor.gguf_source import GGUFSource
from mhconvert.convert.donor.gguf_tokenizer import gguf_tokenizer
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
    import gguf

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


def test_smollm_cuts_digits_apart_before_anything_else(tmp_path):
    file = make_gguf(tmp_path / "tiny.gguf", pre="smollm")
    tokenizer = open_donor(str(file)).tokenizer()
    pieces = [text for text, _ in tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("at  42")]
    assert pieces == ["at", "ĠĠ", "4", "2"]  # plain GPT-2 would give "Ġ", "Ġ42"


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


def test_gguf_scaling_that_is_not_stated_in_full(tmp_path):
    file = make_gguf(tmp_path / "tiny.gguf", facts={"llama.rope.scaling.type": "yarn"})
    with pytest.raises(
        UnsupportedError, match=r"scales RoPE by 'yarn', .* use the model's safetensors folder"
    ):
        open_donor(str(file))


def test_gguf_with_an_unknown_tokenizer(tmp_path):
    donor = open_donor(str(make_gguf(tmp_path / "tiny.gguf", pre="viking")))
    with pytest.raises(
        UnsupportedError, match="with pre-tokenizer 'viking'; known are llama, and gpt2 with gpt-2"
    ):
        donor.tokenizer()


def test_sentencepiece_vocabulary(tmp_path):
    """Pieces merge by score, text starts with a space and <s>, and what is in no piece falls back to bytes."""
    import gguf

    pieces = [f"<0x{byte:02X}>" for byte in range(256)] + list("▁hi") + ["▁h", "▁hi"]
    writer = gguf.GGUFWriter(str(tmp_path / "spm.gguf"), "llama")
    _write_sizes(writer)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(["<unk>", "<s>", "</s>", *pieces])
    writer.add_token_scores([0.0] * (3 + 256) + [-5.0, -6.0, -7.0, -1.0, -2.0])
    writer.add_token_types([2, 3, 3] + [6] * 256 + [1] * 5)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tokenizer = gguf_tokenizer(read_gguf_header(tmp_path / "spm.gguf"))
    assert tokenizer("hi").input_ids == [1, 3 + 256 + 4]
    assert tokenizer("hi hié").input_ids == [1, 263, 263, 3 + 0xC3, 3 + 0xA9]
    assert tokenizer.decode(tokenizer("hi hié").input_ids, skip_special_tokens=True) == "hi hié"
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "</s>")


def _write_sizes(writer) -> None:
    writer.add_context_length(64)
    writer.add_embedding_length(8)
    writer.add_block_count(1)
    writer.add_feed_forward_length(8)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-6)


def real_gguf() -> Path:
    """The embedded SmolLM2, where MHCONVERT_TEST_GGUF points at it or an earlier run left it in the cache."""
    cached = wheel_download.cache_folder() / Path(WHEEL_MODELS["smollm2-135m"].member).name
    return Path(os.environ.get("MHCONVERT_TEST_GGUF", cached))


@pytest.mark.skipif(
    not real_gguf().is_file(), reason="the SmolLM2 GGUF is not in the cache (make demo puts it there)"
)
def test_real_smollm2_equals_the_loader_of_transformers():
    path = real_gguf()
    theirs = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    ).state_dict()
    donor = open_donor(str(path))
    assert set(donor.source.names()) == set(theirs) - {"lm_head.weight"}
    assert all(torch.equal(donor.source.read(name), theirs[name]) for name in donor.source.names())
    tokenizer = donor.tokenizer()
    text = "It's 1234 o'clock,  42 times.\n\n  def f(x):\n\treturn x <|im_start|>user\nhi<|im_end|>\n héllo 日本語 🙂"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer.convert_ids_to_tokens(tokenizer("  42").input_ids) == ["ĠĠ", "4", "2"]
    assert (tokenizer.bos_token, tokenizer.eos_token, len(tokenizer)) == ("<|im_start|>", "<|im_end|>", 49152)
    assert donor.generation_config().eos_token_id == tokenizer.eos_token_id == 2
