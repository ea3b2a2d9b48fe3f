"""OUT.partial: the folder that a run writes into, locked for as long as the run lasts."""

from __future__ import annotations

import errno
import fcntl
import shutil
from contextlib import suppress
from pathlib import Path

from mhconvert.convert.errors import OutputError

WORK = "work"  # the subfolder of OUT.partial that is gone when it is published
LOCK = "lock"  # in it: held as long as a run lasts

DISK_FULL = ("No space left", "PytorchStreamWriter failed", "unexpected pos")  # the last two: torch.save


class PartialFolder:
    """`folder` is OUT.partial, `work` the run's own subfolder of it; neither is made yet."""

    def __init__(self, output: Path):
        self.folder = output.with_name(output.name + ".partial")
        self.work = self.folder / WORK

    def make(self) -> None:
        """Make the work folder, remember which folders above it are new, and lock it.

        Raises OutputError where it cannot be made, and where another run holds the lock.
        """
        self._made = [folder for folder in self.folder.absolute().parents if not folder.exists()]
        try:
            self.work.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.work / LOCK, "w")  # noqa: SIM115
        except OSError as error:
            raise OutputError(f"{self.folder} cannot be made: {error.strerror}") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self.unlock()
            raise OutputError(
                f"another run is writing {self.folder}; wait for it, or choose another -o"
            ) from error

    def unlock(self) -> None:
        """Let another run have it."""
        self._lock.close()

    def empty(self, *kept: str) -> None:
        """Remove everything but the lock and the `kept` files of the work folder."""
        for path in (*self.folder.iterdir(), *self.work.iterdir()):
            if path.name not in (WORK, LOCK, *kept):
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def discard(self) -> None:
        """Remove it, and the folders above it that were made for it."""
        shutil.rmtree(self.folder, ignore_errors=True)
        with suppress(OSError):  # somebody else uses them by now
            for folder in self._made:
                folder.rmdir()


def disk_full(error: BaseException) -> bool:
    """Whether a write failed for want of space."""
    said = str(error)
    return getattr(error, "errno", None) == errno.ENOSPC or any(sign in said for sign in DISK_FULL)
