"""Fingerprints of models: one hash over weights, config and tokenizer, independent of the location."""

from __future__ import annotations

import fnmatch
import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path

from mhconvert.errors import CheckpointError

from ..donor.aliases import ALIASES
from ..donor.gguf_reader import split_parts
from ..donor.hub_download import TEXT_FILES
from ..storage.atomic_files import sha256
from ..storage.regular_file import require_regular
from ..storage.safetensors_reader import INDEX, read_weight_map

MODEL_FILES = (
    *("config.json", "adapter_config.json", "*.safetensors", "*.safetensors.index.json"),
    *TEXT_FILES,
)
BLOCKS, BLOCK = 256, 2**14  # how many blocks of a file `sampled` reads, and the bytes of each

Hash = Callable[[Path], str]  # of a file's content


def of_place(place: Path, hashed: Hash = sha256) -> str:
    """The fingerprint of the model in `place`: a folder, or a GGUF file with all its parts. Raises as `of_folder`."""
    return of_folder(place, hashed) if place.is_dir() else of_files(split_parts(place), hashed)


def of_local(reference: str) -> str | None:
    """The fingerprint, by `sampled`, of a model in a folder or file here; None for one on the Hub, which its name and
    revision tell from others. Raises as `of_folder`."""
    place = Path(reference).expanduser()
    return None if reference in ALIASES or not place.exists() else of_place(place, sampled)


def sampled(path: Path) -> str:
    """The SHA-256 of a file's size and of BLOCKS blocks spread evenly over it: all of a file of up to 4 MiB.

    Fast for files of any size. It tells models apart that were trained, merged or made from another seed, as their
    weights differ throughout; not those of one size that differ in a few rows between the blocks, as `sha256` does.
    Raises OSError.
    """
    size = path.stat().st_size
    digest = hashlib.sha256(f"{size}\n".encode())
    with open(path, "rb") as file:
        for block in range(BLOCKS):
            file.seek(max(block * BLOCK, block * (size - BLOCK) // (BLOCKS - 1)))
            digest.update(file.read(BLOCK))
    return digest.hexdigest()


def of_folder(folder: Path, hashed: Hash = sha256) -> str:
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
    return of_files((folder / name for name in sorted(model_files)), hashed)


def of_files(paths: Iterable[Path], hashed: Hash = sha256) -> str:
    """The SHA-256 over names and contents of the files, in their order.

    Raises:
        CheckpointError: a file cannot be read.
    """
    digest = hashlib.sha256()
    for path in paths:
        require_regular(path)
        try:
            digest.update(f"{path.name} {hashed(path)}\n".encode())
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    return digest.hexdigest()
