"""Output folders that appear under their name only when they are whole.

A command writes into OUT.partial, which is locked while it runs and renamed at the end. `whole_folder` is for a command
that starts over when it was interrupted, `ResumableFolder` for a run that can go on from a state file.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from safetensors import SafetensorError

from mhconvert.errors import OutputError

from .byte_size import shown_size
from .folder_kind import KINDS

WORK = "work"  # the subfolder of OUT.partial that is deleted when OUT.partial is published
LOCK = "lock"  # the file in it that is locked as long as a run lasts

DISK_FULL = ("No space left", "PytorchStreamWriter failed", "unexpected pos")  # the last two: torch.save


class PartialFolder:
    """`folder` is OUT.partial, `work` the run's own subfolder of it; neither is made before `make`."""

    def __init__(self, output: Path):
        self.output = output
        self.folder = output.with_name(output.name + ".partial")
        self.work = self.folder / WORK
        self._new_parents: list[Path] = []
        self._lock: IO[str] | None = None

    def make(self) -> None:
        """Make the work folder, remember which folders above it are new, and lock it.

        Raises OutputError where it cannot be made, and where another run holds the lock.
        """
        self._new_parents = [folder for folder in self.folder.absolute().parents if not folder.exists()]
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
        """Release the lock, if it is held."""
        if self._lock is not None:
            self._lock.close()

    def empty(self, *kept: str) -> None:
        """Remove everything but the lock and the `kept` files of the work folder."""
        for path in (*self.folder.iterdir(), *self.work.iterdir()):
            if path.name not in (WORK, LOCK, *kept):
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def publish(self) -> None:
        """Delete the work folder and rename OUT.partial to OUT."""
        shutil.rmtree(self.work)
        replace_folder(self.folder, self.output)

    def discard(self) -> None:
        """Remove it, and the folders above it that were made for it."""
        shutil.rmtree(self.folder, ignore_errors=True)
        with suppress(OSError):  # another program may have put files there since
            for folder in self._new_parents:
                folder.rmdir()


class ResumableFolder(PartialFolder):
    """OUT.partial of a run that an interruption leaves, with a JSON file in `work` that says what is finished."""

    def __init__(self, output: Path, state_name: str):
        super().__init__(output)
        self.state_file = self.work / state_name

    def state(self) -> dict[str, Any] | None:
        """What is finished; None before the state is first written."""
        return json.loads(self.state_file.read_text()) if self.state_file.is_file() else None

    def enter(
        self,
        needed: int,
        *,
        ours: Callable[[], bool],
        finished: Callable[[dict[str, Any] | None], str],
        resume: bool,
        force: bool,
    ) -> None:
        """Make and lock the folder. An interrupted run's files are kept with `resume` and removed with `force`.

        Args:
            needed: bytes that a new run writes.
            ours: whether a folder that is there already was made by an interrupted run.
            finished: from the state, what an interrupted run has finished, for the message.

        Raises:
            OutputError: The folder is not ours, is locked, or holds an interrupted run and neither `resume` nor
                `force` is given; or the disk is too small.
        """
        found = self.folder.exists()
        if not found:
            check_space(self.folder, needed)
        elif not ours():
            raise OutputError(
                f"{self.folder} is not the work of mhconvert; move it away, or choose another -o"
            )
        self.make()
        try:
            if found and not resume and not force:
                raise OutputError(
                    f"{self.folder} holds an interrupted run ({finished(self.state())}); --resume continues it, "
                    "--force starts over"
                )
            if found and not (resume and self.state_file.is_file()):
                self.empty()
                check_space(self.folder, needed)
        except BaseException:
            self.unlock()
            raise

    def publish(self) -> None:
        self.state_file.unlink()  # first, as nothing can be resumed from a work folder that is half deleted
        super().publish()


@contextmanager
def whole_folder(output: Path, needed: int, *, force: bool) -> Iterator[Path]:
    """OUT.partial to write into. It becomes `output` when the context ends without an error; otherwise it is removed.

    Call `check_free` first: whether `output` itself may be replaced is not checked here.

    Args:
        output: the final folder.
        needed: bytes that will be written.
        force: remove an OUT.partial that an interrupted run left.

    Raises:
        OutputError: The disk is too small, or OUT.partial is there already.
    """
    partial = PartialFolder(output)
    if partial.folder.exists() and not (force and partial.work.is_dir()):
        hint = "--force starts over" if partial.work.is_dir() else "it is not the work of mhconvert"
        raise OutputError(f"{partial.folder} is there already: {hint}; move it away, or choose another -o")
    check_space(partial.folder, needed)
    partial.make()
    try:
        partial.empty()
        yield partial.folder
        partial.publish()
    except BaseException as error:
        partial.discard()
        if disk_full(error):
            raise OutputError(
                f"the disk of {output} is full; free some space, or choose another -o"
            ) from error
        raise
    finally:
        partial.unlock()


def replace_folder(partial: Path, output: Path) -> None:
    """Rename the finished folder to `output`; an old folder of that name is removed only after that."""
    if not os.path.lexists(output):
        os.replace(partial, output)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{output.name}.old-", dir=output.parent))
    os.replace(output, old / output.name)
    os.replace(partial, output)
    shutil.rmtree(old, ignore_errors=True)


def check_free(output: Path, force: bool, *read: Path | None) -> None:
    """Raises OutputError when `output` exists and may not be replaced; a folder that holds one of `read` never may."""
    if os.path.lexists(output) and not force:
        raise OutputError(f"{output} exists; choose another folder with -o, or replace it with --force")
    if os.path.lexists(output) and not output.is_dir():
        raise OutputError(f"{output} is no folder; choose another name with -o")
    if not output.name or output.name == ".." or output.is_mount():
        raise OutputError(f"'{output}' cannot be replaced as a whole; name a folder of its own with -o")
    if any(folder and folder.resolve().is_relative_to(output.resolve()) for folder in read):
        raise OutputError(
            f"{output} is read by this command, or holds what is; choose another folder with -o"
        )
    held = os.path.lexists(output) and any(output.iterdir())
    if held and not any((output / name).is_file() for name in KINDS):
        raise OutputError(f"{output} is no checkpoint, and --force replaces nothing else; choose another -o")


def check_space(folder: Path, needed: int) -> None:
    """Raises OutputError when the disk that will hold `folder` lacks `needed` bytes."""
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed:
        raise OutputError(
            f"the disk of {place} has {shown_size(free)} free and the conversion needs {shown_size(needed)}; free "
            "some, or choose another place with -o"
        )


def disk_full(error: BaseException | None) -> bool:
    """Whether `error` is a write that failed because the disk is full."""
    if not isinstance(error, (OSError, SafetensorError, RuntimeError)):
        return False
    return getattr(error, "errno", None) == errno.ENOSPC or any(sign in str(error) for sign in DISK_FULL)
