"""What may be replaced, a disk that is too small, and how a finished folder gets its name."""

from __future__ import annotations

import shutil
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from mhconvert.convert.storage.disk_space import check_space
from mhconvert.convert.storage.output_folder import check_free
from mhconvert.errors import OutputError


def test_an_output_that_exists(tmp_path: Path) -> None:
    check_free(tmp_path / "new", force=False)
    with pytest.raises(
        OutputError, match=r"exists; choose another folder with -o, or replace it with --force"
    ):
        check_free(tmp_path, force=False)
    check_free(tmp_path, force=True)
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("file", "link"):
        with pytest.raises(OutputError, match=r"is no folder"):
            check_free(tmp_path / name, force=True)
    for place, force in product((Path("."), Path(".."), Path("/")), (False, True)):
        with pytest.raises(OutputError, match=r"cannot be replaced as a whole"):
            check_free(place, force=force)


def test_the_donor_is_never_replaced(tmp_path: Path) -> None:
    donor = tmp_path / "models" / "donor"
    donor.mkdir(parents=True)
    (tmp_path / "link").symlink_to(donor)
    for output in (donor, donor.parent, tmp_path / "link", tmp_path / "models" / ".." / "models" / "donor"):
        with pytest.raises(OutputError, match=r"is read by this command"):
            check_free(output, True, donor)
    check_free(donor / "converted", True, donor)  # beside a GGUF file
    (donor / "config.json").touch()
    for inside in (donor / "converted", tmp_path / "link" / "a" / "b"):
        with pytest.raises(OutputError, match=r"is inside .*donor, which is only read"):
            check_free(inside, True, donor)


def test_a_link_is_not_replaced(tmp_path: Path) -> None:
    real = tmp_path / "real"
    real.mkdir()
    (real / "config.json").touch()
    (tmp_path / "out").symlink_to(real)
    with pytest.raises(OutputError, match=r"out is a link to .*real; name that folder with -o, or remove"):
        check_free(tmp_path / "out", True)


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place: Any = tmp_path / "not" / "yet"
    monkeypatch.setattr(
        shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**10, 10**10 - 10**9, 10**9)
    )  # type: ignore[attr-defined]
    check_space(place, 10**9)
    with pytest.raises(OutputError, match=r"has 1\.00 GB free and the conversion needs 2\.50 GB"):
        check_space(place, 25 * 10**8)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**10, 10**10 - 900, 900))  # type: ignore[attr-defined]
    with pytest.raises(OutputError, match=r"has 900\.00 B free and the conversion needs 1\.25 MB"):
        check_space(place, 1_250_000)
