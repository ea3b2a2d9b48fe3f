"""Links in a model's folder: what is copied or published is what is in the folder, never a file that a link reaches."""

from __future__ import annotations

import re
from pathlib import Path

from mhconvert.errors import CheckpointError

BLOB = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")  # name of a file in the Hub's local cache


def is_inside(folder: Path, file: Path) -> bool:
    """Whether the target of `file` is a file in `folder`, or a blob of the Hub's local cache."""
    target = file.resolve()
    is_blob = target.parent.name == "blobs" and bool(BLOB.fullmatch(target.name))
    return target.is_file() and (target.is_relative_to(folder.resolve()) or is_blob)


def require_inside(folder: Path, file: Path) -> None:
    """Raises CheckpointError for a file that is a link out of `folder`."""
    if not is_inside(folder, file):
        raise CheckpointError(
            f"{file} is a link to {file.resolve()}, outside of its folder, and would be copied; put the file "
            "itself there, or remove the link"
        )
