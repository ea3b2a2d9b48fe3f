"""Fingerprints tell models by what is in their files, wherever they lie, and do not read large files whole."""

from __future__ import annotations

from pathlib import Path

import pytest

from mhconvert.convert.checkpoint.fingerprint import BLOCK, BLOCKS, of_local, sampled


@pytest.mark.parametrize("size", [0, 5, BLOCK + 1, BLOCK * BLOCKS])
def test_every_byte_of_a_small_file_counts(tmp_path: Path, size: int) -> None:
    file, content = tmp_path / "file", bytearray(size)
    file.write_bytes(content)
    found = {sampled(file)}
    places = sorted({0, size // 3, size - 1}) if size else []
    for place in places:
        content[place] = 1
        file.write_bytes(content)
        found.add(sampled(file))
    file.write_bytes(content + b"\0")
    assert len(found | {sampled(file)}) == len(places) + 2


def test_of_a_large_file_both_ends_and_blocks_between_are_read(tmp_path: Path) -> None:
    file, size = tmp_path / "file", 2**34
    with open(file, "wb") as stream:
        stream.truncate(size)  # takes no space
    found = {sampled(file)}
    for place in (0, 100 * (size - BLOCK) // (BLOCKS - 1), size - 1):
        with open(file, "r+b") as stream:
            stream.seek(place)
            stream.write(b"\1")
        found.add(sampled(file))
    assert len(found) == 4


def test_a_model_is_what_is_in_its_files(tmp_path: Path) -> None:
    for folder in ("one", "moved"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config.json").write_text("{}", encoding="utf-8")
        (tmp_path / folder / "model.safetensors").write_bytes(b"weights")
        (tmp_path / folder / "model.gguf").write_bytes(b"weights")
    (tmp_path / "moved" / "README.md").write_text("a card, which is no part of the model", encoding="utf-8")
    for name in ("", "model.gguf"):
        ours, theirs = (of_local(str(tmp_path / folder / name)) for folder in ("one", "moved"))
        assert ours == theirs is not None
        (tmp_path / "moved" / (name or "model.safetensors")).write_bytes(b"another")
        assert of_local(str(tmp_path / "moved" / name)) != ours
    assert of_local("org/name@main") is None
    assert of_local("smollm2-135m") is None
