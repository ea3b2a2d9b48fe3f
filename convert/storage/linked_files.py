"""Links in a model's folder: what is copied or published is a model's file, never a secret that a link reaches."""

from __future__ import annotations

import re
from pathlib import Path

from mhconvert.errors import CheckpointError

from .folder_kind import KINDS

BLOB = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")  # name of a file in the Hub's local cache
MODEL_FILES = (*KINDS, "tokenizer_config.json")  # a folder with one of them is a model's


def is_inside(folder: Path, file: Path) -> bool:
    """Whether the target of `file` is a file in `folder`, or a blob of the Hub's local cache."""
    target = file.resolve()
    is_blob = target.parent.name == "blobs" and bool(BLOB.fullmatch(target.name))
    return target.is_file() and (target.is_relative_to(folder.resolve()) or is_blob)


def require_own(folder: Path, file: Path) -> None:
    """Raises CheckpointError for a file that is a link out of `folder`, but to the file of that name of a model.

    A folder may be put together of links to the files of another.
    """
    target = file.resolve()
    of_model = target.name == file.name and any((target.parent / name).is_file() for name in MODEL_FILES)
    if not is_inside(folder, file) and not of_model:
        raise CheckpointError(
            f"{file} is a link to {target}, which is no file of a model, and would be copied; put the file itself "
            "there, or remove the link"
        )


def own_files(folder: Path) -> list[Path]:
    """The files in `folder` itself. Raises CheckpointError as `require_own` does."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    for file in files:
        require_own(folder, file)
    return files
