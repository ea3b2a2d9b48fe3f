"""What is no regular file is refused at once with its kind, whatever it is given as; no read waits for a writer."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mhconvert.convert.storage.regular_file import require_regular
from mhconvert.errors import CheckpointError
from tests.conftest import Main
from tests.donors import make_donor

SECONDS = 60  # a read of a pipe without a writer never ends


@pytest.fixture(scope="module")
def donor(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_donor(tmp_path_factory.mktemp("regular") / "donor")


@pytest.fixture(autouse=True)
def ends() -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise TimeoutError("a read waits for ever")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def pipe(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def device(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to("/dev/zero")


def folder(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.mkdir()


KINDS: dict[str, Callable[[Path], None]] = {"a pipe": pipe, "a device": device, "a folder": folder}


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_is_named(tmp_path: Path, kind: str) -> None:
    KINDS[kind](tmp_path / "odd")
    with pytest.raises(CheckpointError, match=rf"odd is {kind}, not a file"):
        require_regular(tmp_path / "odd")


def test_files_and_what_is_not_there_are_for_the_reader(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "file")
    for name in ("file", "link", "missing"):
        require_regular(tmp_path / name)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "place", ["config.json", "model.safetensors", "model.safetensors.index.json", "tokenizer_config.json"]
)
def test_a_file_of_a_donor(
    main: Main, donor: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, place: str
) -> None:
    copy = shutil.copytree(donor, tmp_path / "copy")
    if place == "model.safetensors.index.json":
        (copy / "model.safetensors").unlink()
    KINDS[kind](copy / place)
    assert main(copy, "--to", "mla", "-o", tmp_path / "out") == 1
    assert f"{place} is {kind}, not a file" in " ".join(capsys.readouterr().err.split())
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


@pytest.mark.parametrize("kind", ["a pipe", "a device"])
@pytest.mark.parametrize("given", ["text", "text.jsonl", "donor", "donor.gguf", "plan", "recipe", "--text"])
def test_what_a_command_is_given(
    main: Main, donor: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, given: str
) -> None:
    odd = tmp_path / given.strip("-")
    KINDS[kind](odd)
    out = ("--to", "mla", "-o", tmp_path / "out")
    words: dict[str, tuple[object, ...]] = {
        "donor": (odd, *out),
        "donor.gguf": (odd, *out),
        "plan": (donor, *out, "--plan", odd),
        "recipe": ("run", odd),
        "--text": ("eval", donor, "--against", donor, "--text", odd),
    }
    assert main(*words.get(given, (donor, *out, "--calibration", odd))) == 1
    assert f"{odd.name} is {kind}, not a file" in " ".join(capsys.readouterr().err.split())
    assert [path.name for path in tmp_path.iterdir()] == [odd.name]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_file_of_an_adapter(
    main: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, place: str
) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    stated = '{"peft_type": "LORA", "base_model_name_or_path": "nothing", "target_modules": ["q_proj"]}'
    (adapter / "adapter_config.json").write_text(stated)
    KINDS[kind](adapter / place)
    assert main("merge", adapter, "-o", tmp_path / "out") == 1
    assert f"{place} is {kind}, not a file" in " ".join(capsys.readouterr().err.split())
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
