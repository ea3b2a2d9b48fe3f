"""A folder that is written in one go: it appears when it is whole."""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from mhconvert.convert.checkpoint import check_space, replace_folder
from mhconvert.convert.errors import OutputError
from mhconvert.convert.workspace import LOCK, WORK, disk_full


@contextmanager
def whole_folder(output: Path, needed: int, *, force: bool) -> Iterator[Path]:
    """OUT.partial to write into. It becomes `output` when the context ends well; otherwise nothing is left.

    Whether `output` may be replaced was asked before (`checkpoint.check_free`). needed: bytes.
    Raises OutputError when the disk is too small, or OUT.partial is there already; `force` removes what a run that
    was cut short left of it.
    """
    partial = output.with_name(output.name + ".partial")
    work = partial / WORK
    if partial.exists() and not (force and work.is_dir()):
        hint = "--force starts over" if work.is_dir() else "it is not the work of mhconvert"
        raise OutputError(f"{partial} is there already: {hint}; move it away, or choose another -o")
    check_space(partial, needed)
    made = [folder for folder in partial.absolute().parents if not folder.exists()]
    try:
        work.mkdir(parents=True, exist_ok=True)
        lock = open(work / LOCK, "w")  # noqa: SIM115
    except OSError as error:
        raise OutputError(f"{partial} cannot be made: {error.strerror}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise OutputError(
                f"another run is writing {partial}; wait for it, or choose another -o"
            ) from error
        for path in partial.iterdir():
            if path != work:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        try:
            yield partial
            shutil.rmtree(work)
            replace_folder(partial, output)
        except BaseException as error:
            shutil.rmtree(partial, ignore_errors=True)
            for folder in made:
                if folder.is_dir() and not any(folder.iterdir()):
                    folder.rmdir()
            if isinstance(error, (OSError, SafetensorError)) and disk_full(error):
                raise OutputError(
                    f"the disk of {output} is full; free some space, or choose another -o"
                ) from error
            raise
