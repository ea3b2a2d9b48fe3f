"""Whose folder is whose: a run neither works in nor replaces what is not its own, and leaves nothing of a fault."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import mhconvert
from mhconvert.convert.bare_process import reload
from mhconvert.convert.methods.mla.settings import MLASettings
from mhconvert.convert.recipe.recipe import Calibration, Recipe
from mhconvert.errors import MhconvertError, OutputError, ReloadKilledError
from mhconvert.progress import Progress
from tests.donors import make_donor


@pytest.fixture(scope="module")
def donor(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_donor(tmp_path_factory.mktemp("workspace") / "tiny")


@pytest.fixture(scope="module")
def recipe(donor: Path) -> Callable[..., Recipe]:
    text = donor / "text.txt"
    text.write_text("".join(f"{n} boats came home past the town.\n" for n in range(300)), encoding="utf-8")
    part = Calibration((str(text),), tokens=512, sequence_length=64, held_out=2)

    def build(output: Path, **changes: Any) -> Recipe:
        settings: dict[str, Any] = {
            "settings": MLASettings(kv_bits="16"),
            "calibration": part,
            "fit_steps": 0,
            "verify": False,
            "device": "cpu",
        }
        return Recipe(str(donor), "mla", output=str(output), **(settings | changes))

    return build


@pytest.mark.parametrize("options", [{}, {"resume": True}, {"force": True}], ids=["plain", "resume", "force"])
def test_a_run_at_work_is_left_alone(
    recipe: Callable[..., Recipe], tmp_path: Path, options: dict[str, bool]
) -> None:
    def second(event: Progress) -> None:
        if event.stage in ("calibrate", "layers") and event.done == 0:
            with pytest.raises(OutputError, match=r"another run is writing"):
                mhconvert.convert(recipe(tmp_path / "out"), **options)

    mhconvert.convert(recipe(tmp_path / "out"), on_progress=second)
    assert (tmp_path / "out").is_dir()


def test_a_folder_of_somebody_else_is_not_worked_in(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "mine").touch()
    with pytest.raises(OutputError, match=r"is not the work of mhconvert"):
        mhconvert.convert(recipe(tmp_path / "out"), force=True)
    assert (tmp_path / "out.partial" / "mine").exists()


def test_the_donor_is_not_replaced(recipe: Callable[..., Recipe], donor: Path) -> None:
    with pytest.raises(OutputError, match=r"is read by this command"):
        mhconvert.convert(recipe(donor), force=True)
    assert (donor / "model.safetensors").is_file()


def test_a_fault_leaves_no_empty_parents(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    lacking = Calibration((str(tmp_path / "none.txt"),), tokens=128, sequence_length=64)
    with pytest.raises(MhconvertError, match=r"none\.txt cannot be read"):
        mhconvert.convert(recipe(tmp_path / "a" / "b" / "out", calibration=lacking))
    assert list(tmp_path.iterdir()) == []


def test_a_killed_reload_keeps_the_work(
    recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was killed because memory is short: the conversion need not be done again to go without it."""
    killed = subprocess.CompletedProcess([], -9, "", "")
    monkeypatch.setattr(reload.subprocess, "run", lambda *_, **__: killed)
    with pytest.raises(ReloadKilledError, match=r"signal 9 \(out of memory\?\); .* --resume --no-verify"):
        mhconvert.convert(recipe(tmp_path / "out", verify=True))
    first: list[int] = []
    mhconvert.convert(
        recipe(tmp_path / "out"),
        resume=True,
        on_progress=lambda e: first.append(e.done) if e.stage == "layers" else None,
    )
    assert first == [2]
