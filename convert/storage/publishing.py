"""How a finished folder gets its name, so that at every moment the name has the old folder or the whole new one, or a
later run can tell which of the two it should have."""

from __future__ import annotations

import glob
import hashlib
import os
import tempfile
from contextlib import suppress
from pathlib import Path

from .output_lock import OutputLock
from .ownership import delete, is_blank, kind_of, mark, unmark

ASIDE = "replaced"  # kind of the folder in which an output is kept that is being replaced
LONG_NAME = 200  # bytes; longer names stand as their hash


def publish(partial: Path, output: Path, *, finished: bool = True) -> None:
    """Rename `partial`, which is marked as ours, to `output`; an existing `output` is moved aside and deleted last.

    All files are on the disk before the name is: after a power cut, too, `output` is whole. Without `finished` it stays
    marked: as a step to something else, which a later run may delete.
    """
    flush(partial)
    aside = None
    if os.path.lexists(output):
        aside = Path(tempfile.mkdtemp(prefix=_aside_prefix(output), dir=output.parent))
        mark(aside, ASIDE)
        os.replace(output, aside / output.name)
    os.replace(partial, output)
    _flush_one(output.parent)
    if finished:
        unmark(output)
    if aside is not None:
        _remove_aside(aside)


def recover(output: Path) -> None:
    """Put back an `output` that a run moved aside before it was killed, and remove what it was about to delete.

    Does nothing while a run is at it.
    """
    left = [
        found
        for found in output.parent.glob(f"{glob.escape(_aside_prefix(output))}*")
        if kind_of(found) == ASIDE or is_blank(found)
    ]
    if not left or not (lock := OutputLock(output)).acquire():
        return
    try:
        for found in left:
            if os.path.lexists(found / output.name) and not os.path.lexists(output):
                os.replace(found / output.name, output)
            _remove_aside(found)
    finally:
        lock.release()


def _aside_prefix(output: Path) -> str:
    """How the names begin of folders in which `output` is kept; the bytes that a name may have are room for it."""
    name = output.name
    if len(os.fsencode(name)) > LONG_NAME:
        name = hashlib.sha256(os.fsencode(name)).hexdigest()[:16]
    return f".{name}.old-"


def flush(folder: Path) -> None:
    """Write all files of `folder` through to the disk, and then the folders that name them."""
    for place, _, names in os.walk(folder, topdown=False):
        for name in names:
            _flush_one(Path(place, name))
        _flush_one(Path(place))


def _flush_one(path: Path) -> None:
    if path.is_symlink():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_aside(aside: Path) -> None:
    """Delete what was replaced; where that fails, its mark stays, by which a later run knows it."""
    with suppress(OSError):
        delete(aside)
