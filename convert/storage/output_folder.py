"""Output folders that get their final name only when they are complete.

A command writes into OUT.partial, which is locked while it runs and renamed at the end. `whole_folder` is for commands
that start over after an interruption, `ResumableFolder` for runs that can resume from a state file.
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

WORK = "work"  # subfolder of OUT.partial, deleted before OUT.partial is renamed
LOCK = "lock"  # file in WORK that is locked during a run

DISK_FULL = ("No space left", "PytorchStreamWriter failed", "unexpected pos")  # the last two from torch.save


class PartialFolder:
    """The folder of a running command, which `make` creates.

    Attributes:
        output: OUT, the final folder.
        folder: OUT.partial.
        work: subfolder for files that are not part of the result.
    """

    def __init__(self, output: Path):
        self.output = output
        self.folder = output.with_name(output.name + ".partial")
        self.work = self.folder / WORK
        self._new_parents: list[Path] = []
        self._lock: IO[str] | None = None

    def make(self) -> None:
        """Create the folder with its parents, and lock it.

        Raises:
            OutputError: it cannot be created, or another run has locked it.
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
        """Release the lock, if this run has it."""
        if self._lock is not None:
            self._lock.close()

    def empty(self, *kept: str) -> None:
        """Delete everything except the lock and the `kept` files of the work folder."""
        for path in (*self.folder.iterdir(), *self.work.iterdir()):
            if path.name not in (WORK, LOCK, *kept):
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def publish(self) -> None:
        """Delete the work folder and rename OUT.partial to OUT."""
        shutil.rmtree(self.work)
        replace_folder(self.folder, self.output)

    def discard(self) -> None:
        """Delete the folder, and the parents that `make` created."""
        shutil.rmtree(self.folder, ignore_errors=True)
        with suppress(OSError):  # another program may have written files there
            for folder in self._new_parents:
                folder.rmdir()


class ResumableFolder(PartialFolder):
    """The folder of a run that can be resumed, with a JSON file in `work` that records what is finished."""

    def __init__(self, output: Path, state_name: str):
        super().__init__(output)
        self.state_file = self.work / state_name

    def state(self) -> dict[str, Any] | None:
        """The contents of the state file; None before it is first written."""
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
        """Create and lock the folder. The files of an interrupted run are kept with `resume`, deleted with `force`.

        Args:
            needed: bytes that a new run writes.
            ours: whether an existing folder is from an interrupted run.
            finished: state -> what is finished, for an error message.

        Raises:
            OutputError: the folder is not from mhconvert, is locked, or has an interrupted run and neither `resume`
                nor `force` is set; or the disk is too small.
        """
        existed = self.folder.exists()
        if not existed:
            check_space(self.folder, needed)
        elif not ours():
            raise OutputError(
                f"{self.folder} is not the work of mhconvert; move it away, or choose another -o"
            )
        self.make()
        try:
            if existed and not resume and not force:
                raise OutputError(
                    f"{self.folder} holds an interrupted run ({finished(self.state())}); --resume continues it, "
                    "--force starts over"
                )
            if existed and not (resume and self.state_file.is_file()):
                self.empty()
                check_space(self.folder, needed)
        except BaseException:
            self.unlock()
            raise

    def publish(self) -> None:
        self.state_file.unlink()  # first: a partly deleted work folder must not be resumed
        super().publish()


@contextmanager
def whole_folder(output: Path, needed: int, *, force: bool) -> Iterator[Path]:
    """A context with OUT.partial, which is renamed to `output` at the end, or deleted after an error.

    It replaces `output` without a check; call `check_free` first.

    Args:
        needed: bytes that will be written.
        force: delete the OUT.partial of an interrupted run.

    Raises:
        OutputError: the disk is too small, or OUT.partial exists.
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
    """Rename `partial` to `output`; an existing `output` is moved aside first and deleted last."""
    if not os.path.lexists(output):
        os.replace(partial, output)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{output.name}.old-", dir=output.parent))
    os.replace(output, old / output.name)
    os.replace(partial, output)
    shutil.rmtree(old, ignore_errors=True)


def check_free(output: Path, force: bool, *read: Path | None) -> None:
    """Check that `output` may be written.

    Args:
        force: allow to replace an existing checkpoint.
        read: folders that the command reads; `output` must not contain them.

    Raises:
        OutputError: `output` exists and may not be replaced.
    """
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
    has_files = os.path.lexists(output) and any(output.iterdir())
    if has_files and not any((output / name).is_file() for name in KINDS):
        raise OutputError(f"{output} is no checkpoint, and --force replaces nothing else; choose another -o")


def check_space(folder: Path, needed: int) -> None:
    """Raises OutputError if the disk of `folder` has less than `needed` bytes free."""
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
    """Whether `error` is from a write to a full disk."""
    if not isinstance(error, (OSError, SafetensorError, RuntimeError)):
        return False
    return getattr(error, "errno", None) == errno.ENOSPC or any(sign in str(error) for sign in DISK_FULL)
