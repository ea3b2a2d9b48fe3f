"""A command killed before any of its file operations leaves OUT as it was or whole, and the same command then finishes.

A few of these moments in each run of the suite; all of them with MHCONVERT_KILLS=all (`make faults`).
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from mhconvert import api
from mhconvert.convert.methods.dha.settings import DHASettings
from mhconvert.convert.recipe.heal_settings import HealSettings
from mhconvert.convert.recipe.recipe import Calibration, Recipe
from mhconvert.convert.storage.ownership import MARK
from tests.donors import TEXT, make_donor

KILLED = 9
CHANGES = ("os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.link", "shutil.rmtree")
KILLS = os.environ.get("MHCONVERT_KILLS", "2")

Command = Callable[[Path, bool], Any]  # OUT, and whether to go on with an interrupted run


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A donor, a text, a dha checkpoint and an adapter."""
    place = tmp_path_factory.mktemp("faults")
    torch.set_num_threads(1)  # the commands run in forks
    make_donor(place / "donor", hidden=32, vocab=300, layers=1)
    (place / "text.txt").write_text(TEXT * 20, encoding="utf-8")
    convert(place)(place / "dha", False)
    model = AutoModelForCausalLM.from_pretrained(place / "donor")
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(place / "adapter")
    return place


def convert(place: Path) -> Command:
    few = Calibration((str(place / "text.txt"),), tokens=128, sequence_length=32, held_out=2)

    def run(output: Path, again: bool) -> Any:
        recipe = Recipe(
            str(place / "donor"),
            "dha",
            DHASettings(0.75),
            output=str(output),
            calibration=few,
            effort="quick",
            verify=False,
        )
        return api.convert(recipe, resume=again, force=not again)

    return run


def heal(place: Path) -> Command:
    few = HealSettings(
        tokens=64, data={str(place / "text.txt"): 1}, sequence_length=32, batch_tokens=32, held_out=2
    )
    return lambda output, again: api.heal(
        str(place / "dha"), few, output=str(output), resume=again, force=not again, verify=False
    )


def merge(place: Path) -> Command:
    return lambda output, _: api.merge(str(place / "adapter"), output=str(output), force=True)


def export(place: Path) -> Command:
    return lambda output, _: api.export(
        str(place / "dha"), to="llama", output=str(output), duplicate=True, force=True, verify=False
    )


def forked(command: Command, output: Path, again: bool, killed_before: int | None) -> tuple[int, int]:
    """Run a command in a fork: its exit code, and how many changes of files near `output` it began."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        begun = [0]

        def count(event: str, arguments: tuple[Any, ...]) -> None:
            writes = event == "open" and arguments[1] not in (None, "r", "rb")
            if not (writes or event in CHANGES) or str(output.parent) not in str(arguments[0]):
                return
            if begun[0] == killed_before:
                os._exit(KILLED)
            begun[0] += 1

        sys.addaudithook(count)
        code = 1
        try:
            command(output, again)
            code = 0
        finally:
            os.write(writing, begun[0].to_bytes(4, "little"))
            os._exit(code)
    os.close(writing)
    _, status = os.waitpid(child, 0)
    with os.fdopen(reading, "rb") as pipe:
        return os.waitstatus_to_exitcode(status), int.from_bytes(pipe.read(), "little")


def content(folder: Path) -> dict[str, str]:
    """Each file's hash; without what says where and when a run was, and how long it took."""
    timed = ("recipe.yaml", "report.json", "mhconvert.json", "README.md", "metrics.jsonl", "healing.svg")
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in timed
    }


def empty(folder: Path, existed: bool) -> Path:
    """An OUT in a new `folder`: none, or one that is to be replaced."""
    output = folder / "out"
    output.mkdir(parents=True)
    (output / "config.json").write_text("old")
    if not existed:
        shutil.rmtree(output)
    return output


def moments(total: int, index: int) -> list[int]:
    """Before which changes a command is killed: all, or a few that lie evenly, others for each command."""
    if KILLS == "all":
        return list(range(total))
    return sorted({(index + total * part // int(KILLS)) % total for part in range(int(KILLS))} | {total - 1})


COMMANDS = {"convert": convert, "heal": heal, "merge": merge, "export": export}
CASES = [("convert", False), ("convert", True), ("heal", False), ("merge", True), ("export", False)]
if KILLS == "all":
    CASES = [(name, existed) for name in COMMANDS for existed in (False, True)]


@pytest.mark.parametrize(("name", "existed"), CASES)
def test_killed_at_any_change_of_a_file(place: Path, tmp_path: Path, name: str, existed: bool) -> None:
    command, whole = COMMANDS[name](place), empty(tmp_path / "whole", existed)
    old = content(whole)
    code, total = forked(command, whole, False, None)
    assert (code, total > 10) == (0, True)
    expected = content(whole)
    assert expected
    assert MARK not in expected
    for moment in moments(total, list(COMMANDS).index(name)):
        output = empty(tmp_path / str(moment), existed)
        assert forked(command, output, False, moment)[0] == KILLED
        found = content(output)
        found.pop(MARK, None)  # is removed when the name is there
        if output.exists():  # between two renames it does not, and the next run puts it right
            assert found in (expected, *([old] if existed else [])), moment
        code, _ = forked(command, output, True, None)
        if code:  # nothing was begun, or all was done
            code, _ = forked(command, output, False, None)
        assert code == 0, moment
        assert content(output) == expected, moment
        assert [path.name for path in output.parent.iterdir()] == ["out"], moment
