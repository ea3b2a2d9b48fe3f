"""Fingerprints of models: one hash over weights, config and tokenizer, independent of the location."""

from __future__ import annotations

import fnmatch
import hashlib
from collections.abc import Iterable
from pathlib import Path

from mhconvert.errors import CheckpointError

from ..donor.hub_download import TEXT_FILES
from ..storage.atomic_files import sha256
from ..storage.safetensors_reader import INDEX, read_weight_map

MODEL_FILES = (
    *("config.json", "adapter_config.json", "*.safetensors", "*.safetensors.index.json"),
    *TEXT_FILES,
)


def of_folder(folder: Path) -> str:
    """The SHA-256 over names and contents of the model files in `folder`, without reports, cards, code and licences.

    Raises:
        CheckpointError: the folder has no model files, or one cannot be read.
    """
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    model_files = {name for name in names if any(fnmatch.fnmatch(name, pattern) for pattern in MODEL_FILES)}
    if INDEX in model_files:
        model_files |= set(read_weight_map(folder).values())  # which may lie in folders inside
    if not model_files:
        raise CheckpointError(f"{folder} has no model files")
    return of_files(folder / name for name in sorted(model_files))


def of_files(paths: Iterable[Path]) -> str:
    """The SHA-256 over names and contents of the files, in their order.

    Raises:
        CheckpointError: a file cannot be read.
    """
    digest = hashlib.sha256()
    for path in paths:
        try:
            digest.update(f"{path.name} {sha256(path)}\n".encode())
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    return digest.hexdigest()
