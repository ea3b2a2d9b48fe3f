"""Shards as safetensors reads them, and a writer that can be cut short anywhere."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mhconvert.convert.storage.safetensors_reader import INDEX
from mhconvert.convert.storage.shard_writer import ShardWriter


def tensors(count: int = 6) -> dict[str, Tensor]:
    """Of several dtypes and shapes: one not contiguous, one of an odd number of bytes per row, one empty."""
    generator = torch.Generator().manual_seed(0)
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    many = {
        f"model.layers.{n}.weight": torch.randn(5, 7 + n, generator=generator).to(dtypes[n % 4])
        for n in range(count - 1)
    }
    many["model.layers.1.weight"] = many["model.layers.1.weight"].T
    return many | {"model.empty": torch.zeros(0, 3)}


def write(folder: Path, limit: int, held: dict[str, Tensor]) -> int:
    folder.mkdir(exist_ok=True)
    writer = ShardWriter(folder, limit, len(held))
    for name, tensor in held.items():
        writer.add(name, tensor)
    writer.flush()
    return writer.finish()


def read(folder: Path) -> dict[str, Tensor]:
    """All tensors of all shards, by safetensors itself."""
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}


def expect(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


def test_one_shard_is_what_safetensors_reads(tmp_path: Path) -> None:
    total = write(tmp_path, 10**9, tensors())
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]
    expect(read(tmp_path), tensors())
    assert total == sum(t.numel() * t.element_size() for t in tensors().values())
    save_file(
        {k: t.contiguous() for k, t in tensors().items()}, tmp_path / "theirs", metadata={"format": "pt"}
    )
    assert (tmp_path / "model.safetensors").stat().st_size >= (tmp_path / "theirs").stat().st_size


@pytest.mark.parametrize("limit", [1, 200, 300])
def test_several_shards_and_their_index(tmp_path: Path, limit: int) -> None:
    total = write(tmp_path, limit, tensors(9))
    files = sorted(file.name for file in tmp_path.glob("*.safetensors"))
    assert len(files) > 2
    assert files == [f"model-{n:05d}-of-{len(files):05d}.safetensors" for n in range(1, len(files) + 1)]
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"]["total_size"] == total
    expect(read(tmp_path), tensors(9))
    for name, file in index["weight_map"].items():
        held = load_file(tmp_path / file)
        assert name in held
        assert len(held) == 1 or sum(t.numel() * t.element_size() for t in held.values()) <= limit


def test_many_tensors_with_long_names_fit_the_header(tmp_path: Path) -> None:
    held = {f"model.layers.{n}.block_sparse_moe.experts.{n}.gate_up_projection.weight": torch.ones(1)
            for n in range(300)}  # fmt: skip
    write(tmp_path, 10**9, held)
    expect(read(tmp_path), held)


@pytest.mark.parametrize("limit", [300, 10**9], ids=["shards", "one"])
@pytest.mark.parametrize("cut", [0, 1, 3, 5])
def test_a_resumed_writer_gives_the_same_bytes(tmp_path: Path, limit: int, cut: int) -> None:
    held = tensors(7)
    write(tmp_path / "whole", limit, held)
    folder = tmp_path / "cut"
    folder.mkdir()
    writer, state = ShardWriter(folder, limit, len(held)), ""
    for number, (name, tensor) in enumerate(held.items()):
        if number == cut:
            state = json.dumps(writer.state)
        if number < cut + 2:
            writer.add(name, torch.zeros_like(tensor) if number >= cut else tensor)  # lost with the cut
    resumed = ShardWriter(folder, limit, len(held), json.loads(state))
    for name, tensor in list(held.items())[cut:]:
        resumed.add(name, tensor)
    resumed.finish()
    assert contents(folder) == contents(tmp_path / "whole")


@pytest.mark.parametrize("renamed", [0, 1, 2, 3])
def test_a_run_cut_short_while_its_shards_were_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, renamed: int
) -> None:
    held = tensors(9)
    write(tmp_path / "whole", 300, held)
    folder, done = tmp_path / "cut", 0
    folder.mkdir()
    writer = ShardWriter(folder, 300, len(held))
    for name, tensor in held.items():
        writer.add(name, tensor)
    state, replace = json.dumps(writer.state), os.replace

    def interrupted(source: Path, target: Path) -> None:
        nonlocal done
        if done == renamed:
            raise KeyboardInterrupt
        done += 1
        replace(source, target)

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        writer.finish()
    monkeypatch.undo()
    ShardWriter(folder, 300, len(held), json.loads(state)).finish()
    assert contents(folder) == contents(tmp_path / "whole")


def test_a_shard_is_no_checkpoint_before_it_is_finished(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, 10**9, 2)
    writer.add("a", torch.ones(3))
    writer.flush()
    (file,) = tmp_path.iterdir()
    assert not file.name.startswith("model")
    with pytest.raises(SafetensorError):
        load_file(file)


def test_a_new_writer_clears_what_a_lost_one_left(tmp_path: Path) -> None:
    ShardWriter(tmp_path, 10**9, 1).add("lost", torch.ones(3))
    (tmp_path / "tokenizer.json").write_text("{}")
    ShardWriter(tmp_path, 10**9, 1)
    assert [file.name for file in tmp_path.iterdir()] == ["tokenizer.json"]
