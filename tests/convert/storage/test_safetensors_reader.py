"""Tensors come back bit for bit, from one file and from shards; damaged files are named."""

import json
import os
import struct
import subprocess
import sys
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mhconvert.convert.storage.safetensors_reader import INDEX, WEIGHTS, SafetensorsSource
from mhconvert.errors import CheckpointError, MhconvertError
from tests.donors import make_donor, make_gguf


def message(error: "pytest.ExceptionInfo[MhconvertError]") -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shards", [1, 3])
def test_safetensors_bit_for_bit(tmp_path, shards, dtype):
    make_donor(tmp_path, shards=shards, dtype=dtype, tied=False)
    stored: dict[str, torch.Tensor] = {}
    for file in tmp_path.glob("*.safetensors"):
        stored |= load_file(file)
    source = SafetensorsSource(tmp_path)
    assert set(source.names()) == set(stored)
    for name, weight in stored.items():
        assert torch.equal(source.read(name), weight)
        assert source.shape(name) == tuple(weight.shape)
        assert source.dtype(name) == weight.dtype == dtype
        assert source.nbytes(name) == weight.numel() * weight.element_size()


def test_scalars_and_empty_tensors(tmp_path):
    stored = {"scalar": torch.tensor(3.0), "empty": torch.zeros(0, 4), "flags": torch.tensor([True, False])}
    save_file(stored, tmp_path / WEIGHTS)
    source = SafetensorsSource(tmp_path)
    assert all(torch.equal(source.read(name), weight) for name, weight in stored.items())


def test_a_file_larger_than_the_memory(tmp_path):
    """A terabyte of zeros, of which the disk holds nothing."""
    row = 2**20 * 2  # bytes
    rows = 2**40 // row
    facts = {
        "all": {"dtype": "BF16", "shape": [rows - 1, 2**20], "data_offsets": [0, 2**40 - row]},
        "last": {"dtype": "BF16", "shape": [2**20], "data_offsets": [2**40 - row, 2**40]},
    }
    header = json.dumps(facts).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        try:
            file.truncate(8 + len(header) + 2**40)
        except OSError:
            pytest.skip("the file system has no files with holes")
    source = SafetensorsSource(tmp_path)
    assert source.shape("all") == (rows - 1, 2**20)
    assert not source.read("last").any()


def test_truncated_file_is_named_at_construction(tmp_path):
    file = make_donor(tmp_path) / WEIGHTS
    whole = file.stat().st_size
    os.truncate(file, whole - 100)
    with pytest.raises(CheckpointError) as error:
        SafetensorsSource(tmp_path)
    assert f"{file} is truncated: {whole - 100} bytes of {whole}" in message(error)


@pytest.mark.parametrize("content", [b"", b"\x10", b"\xff" * 64, struct.pack("<Q", 4) + b"{]}x" + b"0" * 32])
def test_file_that_is_no_safetensors(tmp_path, content):
    (tmp_path / WEIGHTS).write_bytes(content)
    with pytest.raises(
        CheckpointError, match=r"model\.safetensors is (truncated or )?not a (valid )?safetensors"
    ):
        SafetensorsSource(tmp_path)


@pytest.mark.parametrize(
    "facts",
    [
        {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [-1, -4], "data_offsets": [0, 16]},
        {"dtype": "F3", "shape": [4], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [4]},
        "a string",
    ],
)
def test_header_that_contradicts_itself(tmp_path, facts):
    header = json.dumps({"w": facts}).encode()
    (tmp_path / WEIGHTS).write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 16)
    with pytest.raises(CheckpointError, match="is not a valid safetensors file"):
        SafetensorsSource(tmp_path)


@pytest.mark.parametrize(
    ("offsets", "size"),
    [
        ({"a": [0, 8], "b": [0, 8]}, 8),
        ({"a": [0, 8], "b": [4, 12]}, 12),
        ({"a": [4, 12]}, 12),
        ({"a": [0, 8], "b": [12, 20]}, 20),
        ({"a": [0, 8]}, 12),
    ],
    ids=["twice", "overlapping", "shifted", "hole", "surplus"],
)
def test_tensors_tile_the_file(tmp_path, offsets, size):
    header = json.dumps(
        {name: {"dtype": "F32", "shape": [2], "data_offsets": place} for name, place in offsets.items()}
    ).encode()
    (tmp_path / WEIGHTS).write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * size)
    with pytest.raises(CheckpointError, match=r"is not a valid safetensors file \((invalid|incomplete)"):
        SafetensorsSource(tmp_path)


@pytest.mark.parametrize("shape", [[2.0], [True, 2], ["2"]])
def test_shapes_are_whole_numbers(tmp_path, shape):
    header = json.dumps({"a": {"dtype": "F32", "shape": shape, "data_offsets": [0, 8]}}).encode()
    (tmp_path / WEIGHTS).write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 8)
    with pytest.raises(CheckpointError, match="is not a valid safetensors file"):
        SafetensorsSource(tmp_path)


def test_git_lfs_pointer(tmp_path):
    (tmp_path / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(CheckpointError, match="is a Git LFS pointer, not the weights; run 'git lfs pull'"):
        SafetensorsSource(tmp_path)


def test_missing_shard_is_named(tmp_path):
    make_donor(tmp_path, shards=3)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError) as error:
        SafetensorsSource(tmp_path)
    assert "shard model-00002-of-00003.safetensors named in" in message(error)
    assert "is missing; download the checkpoint again" in message(error)


@pytest.mark.parametrize(
    "place", ["../model.safetensors", "/etc/model.safetensors", "a\\b.safetensors", "x.bin", 3]
)
def test_index_must_stay_inside_the_folder(tmp_path, place):
    save_file({"w": torch.zeros(1)}, tmp_path / "model.safetensors")
    folder = tmp_path / "inner"
    folder.mkdir()
    (folder / INDEX).write_text(json.dumps({"weight_map": {"w": place}}))
    with pytest.raises(CheckpointError, match="which is not a safetensors file inside its folder"):
        SafetensorsSource(folder)


def test_index_that_names_an_absent_tensor(tmp_path):
    save_file({"w": torch.zeros(1)}, tmp_path / "a.safetensors")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"v": "a.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"places tensor v in a\.safetensors, which does not have it"):
        SafetensorsSource(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": {}}'])
def test_index_that_cannot_be_read(tmp_path, text):
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json"):
        SafetensorsSource(tmp_path)


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (
            ["pytorch_model.bin"],
            "holds pickled weights only (pytorch_model.bin); mhconvert reads safetensors or GGUF",
        ),
        (["model.Q8_0.gguf"], "to use its GGUF, give that file itself: model.Q8_0.gguf"),
        ([], "holds no weights: neither model.safetensors nor model.safetensors.index.json"),
    ],
)
def test_folder_without_safetensors(tmp_path, files, words):
    for name in files:
        (tmp_path / name).touch()
    with pytest.raises(CheckpointError) as error:
        SafetensorsSource(tmp_path)
    assert words in message(error)


@pytest.mark.parametrize(("value", "kind"), [(float("nan"), "NaN"), (float("inf"), "infinite")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_that_are_not_finite_name_tensor_and_file(tmp_path, value, kind, dtype):
    weights = {"good": torch.zeros(4, dtype=dtype), "bad": torch.tensor([0.0, value, 1.0], dtype=dtype)}
    save_file(weights, tmp_path / WEIGHTS)
    source = SafetensorsSource(tmp_path)
    source.read("good")
    with pytest.raises(CheckpointError) as error:
        source.read("bad")
    assert f"tensor bad in {tmp_path / WEIGHTS} holds {kind} values" in message(error)


def test_unknown_tensor_is_named(tmp_path):
    save_file({"w": torch.zeros(1)}, tmp_path / WEIGHTS)
    with pytest.raises(CheckpointError, match="tensor nothing is not in"):
        SafetensorsSource(tmp_path).read("nothing")


PEAK = """
import resource, sys
from pathlib import Path
from mhconvert.convert.donor.gguf_reader import read_gguf_header
from mhconvert.convert.donor.gguf_source import GGUFSource
from mhconvert.convert.storage.safetensors_reader import SafetensorsSource
place = Path(sys.argv[1])
source = GGUFSource(read_gguf_header(place)) if place.suffix == ".gguf" else SafetensorsSource(place)
base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for name in source.names():
    source.read(name)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base)
"""


@pytest.mark.parametrize("kind", ["safetensors", "gguf"])
def test_reading_keeps_no_pages(tmp_path, kind):
    """About 59 MB in 64 layers are read within a third of that: nothing grows with the model."""
    shape: dict[str, Any] = {"layers": 64, "hidden": 160, "heads": 4, "kv_heads": 2}
    if kind == "gguf":
        place = make_gguf(tmp_path / "deep.gguf", quantization="F32", **shape)
    else:
        place = make_donor(tmp_path, **shape)
    size = sum(f.stat().st_size for f in tmp_path.iterdir())
    assert size > 30e6
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(place)], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) * 1024 < size / 3
