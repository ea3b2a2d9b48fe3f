"""A name has the old folder or the whole new one, wherever a run is killed; nothing but our own work is deleted."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from mhconvert.convert.storage.output_folder import PartialFolder, ResumableFolder, check_free
from mhconvert.convert.storage.output_lock import OutputLock
from mhconvert.convert.storage.ownership import MARK, kind_of, mark
from mhconvert.convert.storage.publishing import publish
from mhconvert.convert.storage.whole_folder import whole_folder
from mhconvert.errors import OutputError

KILLED = 9
FILE_EVENTS = ("open", "os.mkdir", "os.remove", "os.rename", "os.rmdir")


def write(output: Path, text: str, *, force: bool = True) -> None:
    """What a command does: check, write two files into OUT.partial, publish."""
    check_free(output, force)
    with whole_folder(output, 0, force=force) as folder:
        for name in ("config.json", "more.json"):
            (folder / name).write_text(text)


def killed_at(operation: int, output: Path, text: str) -> bool:
    """Whether `write` in a process of its own was killed before its file operation of this number."""
    child = os.fork()
    if child == 0:
        left = [operation]

        def count(event: str, arguments: tuple[object, ...]) -> None:
            if event in FILE_EVENTS and str(output) in str(arguments[0]):
                left[0] -= 1
                if left[0] < 0:
                    os._exit(KILLED)

        sys.addaudithook(count)
        write(output, text)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == KILLED


def content(output: Path) -> set[str]:
    return {(output / name).read_text() for name in ("config.json", "more.json")}


@pytest.mark.parametrize("existed", [False, True], ids=["new", "replaced"])
def test_a_run_killed_at_any_file_operation_loses_nothing(tmp_path: Path, existed: bool) -> None:
    whole, operation = False, 0
    while not whole:
        place = tmp_path / str(operation)
        place.mkdir()
        output = place / "out"
        if existed:
            write(output, "old")
        whole = not killed_at(operation, output, "new")
        if existed or output.exists():
            check_free(output, force=True)  # any command that would write there puts things right
            assert content(output) in ({"old"}, {"new"})
        write(output, "newest")
        assert content(output) == {"newest"}
        assert [path.name for path in place.iterdir()] == ["out"]
        assert sorted(path.name for path in output.iterdir()) == ["config.json", "more.json"]
        operation += 1
    assert operation > 15


def test_the_finished_folder_takes_the_place_of_the_old(tmp_path: Path) -> None:
    partial, output = tmp_path / "out.partial", tmp_path / "out"
    for folder, text in ((partial, "new"), (output, "old"), (tmp_path / ".out.old-mine", "somebody's")):
        folder.mkdir()
        (folder / "file").write_text(text)
    mark(partial, "write")
    publish(partial, output)
    check_free(output / "inside", force=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.old-mine", "out"]
    assert [path.name for path in output.iterdir()] == ["file"]
    assert (output / "file").read_text() == "new"


def test_a_link_is_replaced_and_what_it_points_at_stays(tmp_path: Path) -> None:
    partial, real, output = tmp_path / "out.partial", tmp_path / "real", tmp_path / "out"
    partial.mkdir()
    real.mkdir()
    (real / "file").touch()
    output.symlink_to(real)
    publish(partial, output)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "real"]
    assert not output.is_symlink()
    assert (real / "file").exists()


@pytest.mark.parametrize(
    "disguise", ["work", "recipe", "mark of another", "link", "link as mark", "work as link"]
)
def test_what_only_looks_like_our_work_is_left_alone(tmp_path: Path, disguise: str) -> None:
    partial, ours = tmp_path / "out.partial", tmp_path / "ours"
    ours.mkdir()
    mark(ours, "convert")
    (ours / "precious").touch()
    if disguise == "link":
        partial.symlink_to(ours)
    else:
        partial.mkdir()
        (partial / "precious").touch()
    if disguise == "work":
        (partial / "work").mkdir()
    elif disguise == "recipe":
        (partial / "recipe.yaml").touch()
    elif disguise == "mark of another":
        (partial / MARK).write_text('{"format": "other"}')
    elif disguise == "link as mark":
        (partial / MARK).symlink_to(ours / MARK)
    elif disguise == "work as link":
        mark(partial, "convert")
        (partial / "work").symlink_to(ours)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(OutputError, match="is not the work of mhconvert"):
        write(tmp_path / "out", "new")
    for resume, force in ((True, False), (False, True)):
        folder = ResumableFolder(tmp_path / "out", "convert", "state.json")
        with pytest.raises(OutputError, match="is not the work of mhconvert"):
            folder.enter(0, finished=str, resume=resume, force=force)
    assert sorted(tmp_path.rglob("*")) == before


def test_one_command_does_not_resume_the_work_of_another(tmp_path: Path) -> None:
    begun = PartialFolder(tmp_path / "out", "heal")
    begun.make()
    begun.unlock()
    folder = ResumableFolder(tmp_path / "out", "convert", "state.json")
    for resume in (False, True):
        with pytest.raises(OutputError, match="an interrupted run of another command; --force starts over"):
            folder.enter(0, finished=str, resume=resume, force=False)
    folder.enter(0, finished=str, resume=False, force=True)
    assert kind_of(folder.folder) == "convert"
    folder.unlock()


def test_a_lock_is_for_one_and_leaves_no_file(tmp_path: Path) -> None:
    first, second = OutputLock(tmp_path / "out"), OutputLock(tmp_path / "out")
    assert first.acquire()
    assert not second.acquire()
    first.release()
    assert second.acquire()
    second.release()
    assert list(tmp_path.iterdir()) == []


def test_a_long_name_is_replaced_and_one_too_long_is_refused(tmp_path: Path) -> None:
    longest = tmp_path / ("n" * 247)
    for text in ("old", "new"):
        write(longest, text)
    assert content(longest) == {"new"}
    assert list(tmp_path.iterdir()) == [longest]
    with pytest.raises(OutputError, match="is too long: it may have 247 bytes"):
        write(tmp_path / ("é" * 124), "new")
