"""Refuses what is no regular file before it is opened: reading from a pipe or a device may wait for ever."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from mhconvert.errors import CheckpointError, MhconvertError

KINDS = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}


def require_regular(path: Path, error: type[MhconvertError] = CheckpointError) -> None:
    """Raises `error` with the kind of `path` where it is there and is no file; links are followed."""
    try:
        kind = KINDS.get(stat.S_IFMT(os.stat(path).st_mode))
    except (OSError, ValueError):  # opening it says why
        return
    if kind is not None:
        raise error(f"{path} is {kind}, not a file")
