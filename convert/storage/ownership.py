"""The mark of folders that mhconvert made for its own work: nothing without one is ever emptied or removed."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from pathlib import Path

MARK, UNFINISHED = ".mhconvert", ".mhconvert.new"  # files in the folder
FORMAT = "a folder of unfinished work of mhconvert, which it may delete"


def mark(folder: Path, kind: str) -> None:
    """Mark a folder that was just created, or is ours, as that of a run of this kind."""
    text = json.dumps({"format": FORMAT, "kind": kind, "id": secrets.token_hex(16)})
    (folder / UNFINISHED).unlink(missing_ok=True)  # it might be a link
    (folder / UNFINISHED).write_text(text, encoding="utf-8")
    os.replace(folder / UNFINISHED, folder / MARK)


def kind_of(folder: Path) -> str | None:
    """The kind of run that `folder` is marked for; None for a folder, or a link to one, that is not ours."""
    try:
        if folder.is_symlink():
            return None
        with open(
            os.open(folder / MARK, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), encoding="utf-8"
        ) as file:
            found = json.load(file)
    except (OSError, ValueError):
        return None
    return str(found.get("kind")) if isinstance(found, dict) and found.get("format") == FORMAT else None


def is_blank(folder: Path) -> bool:
    """Whether `folder` holds nothing but, perhaps, an unfinished mark: its run was killed at once."""
    if folder.is_symlink() or not folder.is_dir():
        return False
    return all(path.name == UNFINISHED for path in folder.iterdir())


def unmark(folder: Path) -> None:
    """Take the mark off a folder whose work is finished."""
    (folder / MARK).unlink(missing_ok=True)


def empty(folder: Path, *kept: str) -> None:
    """Delete what is in `folder`, following no link, except its mark and the entries that are `kept`."""
    for path in folder.iterdir():
        if path.name not in (MARK, *kept):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def delete(folder: Path) -> None:
    """Delete `folder`; its mark last, so that a deletion that is cut short can be done again."""
    empty(folder)
    shutil.rmtree(folder)
