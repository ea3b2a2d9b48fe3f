"""One hash for a model: of its weights, config and tokenizer, independent of where it is stored."""

from __future__ import annotations

import fnmatch
import hashlib
from collections.abc import Iterable
from pathlib import Path

from mhconvert.errors import CheckpointError

from ..donor.hub_download import TEXT_FILES
from ..storage.atomic_files import sha256

MODEL_FILES = (
    *("config.json", "adapter_config.json", "*.safetensors", "*.safetensors.index.json"),
    *TEXT_FILES,
)


def of_folder(folder: Path) -> str:
    """The SHA-256 of the model files in `folder`, by name and content; reports, cards, code and licences do not count.

    Raises CheckpointError for a folder without any, or one that cannot be read.
    """
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    found = [name for name in names if any(fnmatch.fnmatch(name, pattern) for pattern in MODEL_FILES)]
    if not found:
        raise CheckpointError(f"{folder} has no model files")
    return of_files(folder / name for name in found)


def of_files(paths: Iterable[Path]) -> str:
    """The SHA-256 over the files' names and contents."""
    digest = hashlib.sha256()
    for path in paths:
        try:
            digest.update(f"{path.name} {sha256(path)}\n".encode())
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    return digest.hexdigest()
