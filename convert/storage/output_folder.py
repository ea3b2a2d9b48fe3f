"""Output folders that get their final name only when they are complete.

A command writes into OUT.partial, which is locked while it runs and renamed at the end. `ResumableFolder` is for runs
that can resume from a state file; `whole_folder.py` has what starts over after an interruption.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from mhconvert.errors import CheckpointError, OutputError

from .disk_space import check_space
from .folder_kind import KINDS
from .output_lock import OutputLock
from .ownership import empty, is_blank, kind_of, mark
from .publishing import publish, recover

PARTIAL = ".partial"
LONGEST_NAME = 255 - len(PARTIAL)  # bytes
WORK = "work"  # subfolder of OUT.partial, deleted before OUT.partial is renamed


class PartialFolder:
    """The folder of a running command, which `make` creates.

    Attributes:
        output: OUT, the final folder.
        folder: OUT.partial.
        work: subfolder for files that are not part of the result.
        kind: of the run, which no other kind resumes.
    """

    def __init__(self, output: Path, kind: str):
        self.output, self.kind = output, kind
        self.folder = output.with_name(output.name + PARTIAL)
        self.work = self.folder / WORK
        self._new_parents: list[Path] = []
        self._lock = OutputLock(output)

    @property
    def exists(self) -> bool:
        """Whether there is anything of this name."""
        return os.path.lexists(self.folder)

    @property
    def is_ours(self) -> bool:
        """Whether mhconvert made the folder, for whatever kind of run."""
        marked = kind_of(self.folder) is not None and not self.work.is_symlink()
        return marked or is_blank(self.folder)

    def make(self) -> None:
        """Lock OUT, and create the folder with its parents where it is not there.

        Raises:
            OutputError: it cannot be created, or another run has locked it.
        """
        self._new_parents = [folder for folder in self.folder.absolute().parents if not folder.exists()]
        try:
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            if not self._lock.acquire():
                raise OutputError(f"another run is writing {self.folder}; wait for it, or choose another -o")
            self.folder.mkdir(exist_ok=True)
            if is_blank(self.folder):
                mark(self.folder, self.kind)
            self.work.mkdir(exist_ok=True)
        except OSError as error:
            self.unlock()
            raise OutputError(f"{self.folder} cannot be made: {error.strerror or error}") from error

    def unlock(self) -> None:
        """Release the lock, if this run has it."""
        self._lock.release()

    def empty(self, *kept: str) -> None:
        """Delete everything except the `kept` files of the work folder; from here the folder is of this kind of run."""
        empty(self.folder, WORK)
        empty(self.work, *kept)
        mark(self.folder, self.kind)

    def publish(self, *, finished: bool = True) -> None:
        """Delete the work folder and rename OUT.partial to OUT; `finished` as `publishing.publish` has it."""
        shutil.rmtree(self.work)
        publish(self.folder, self.output, finished=finished)

    def discard(self) -> None:
        """Delete the folder, and the parents that `make` created."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.unlock()
        with suppress(OSError):  # another program may have written files there
            for folder in self._new_parents:
                folder.rmdir()


class ResumableFolder(PartialFolder):
    """The folder of a run that can be resumed, with a JSON file in `work` that records what is finished."""

    def __init__(self, output: Path, kind: str, state_name: str):
        super().__init__(output, kind)
        self.state_file = self.work / state_name

    def state(self) -> dict[str, Any] | None:
        """The contents of the state file; None before it is first written."""
        return json.loads(self.state_file.read_text()) if self.state_file.is_file() else None

    def require_usable(
        self, finished: Callable[[dict[str, Any] | None], str] | None = None, *, resume: bool, force: bool
    ) -> None:
        """Raise OutputError where no run may begin or go on in the folder, for the reasons of `enter`."""
        if self.exists and not self.is_ours:
            raise OutputError(
                f"{self.folder} is not the work of mhconvert; move it away, or choose another -o"
            )
        if not self.exists or force:
            return
        if kind_of(self.folder) not in (None, self.kind):
            raise OutputError(
                f"{self.folder} holds an interrupted run of another command; --force starts over"
            )
        if not resume:
            done = f" ({finished(self.state())})" if finished else ""
            raise OutputError(
                f"{self.folder} holds an interrupted run{done}; --resume continues it, --force starts over"
            )

    def enter(
        self,
        needed: int,
        *,
        finished: Callable[[dict[str, Any] | None], str],
        resume: bool,
        force: bool,
    ) -> None:
        """Create and lock the folder. The files of an interrupted run are kept with `resume`, deleted with `force`.

        Args:
            needed: bytes that a new run writes.
            finished: state -> what is finished, for an error message.

        Raises:
            OutputError: the folder is not from mhconvert, is locked, or has an interrupted run and neither `resume`
                nor `force` is set, or one of another kind to resume; or the disk is too small.
        """
        existed = self.exists
        if not existed:
            check_space(self.folder, needed)
        self.require_usable(resume=resume, force=True)  # the rest once no other run is writing it
        self.make()
        try:
            if existed:
                self.require_usable(finished, resume=resume, force=force)
            if existed and not (resume and self.state_file.is_file()):
                self.empty()
                check_space(self.folder, needed)
        except BaseException:
            self.unlock()
            raise

    def leave(self, error: BaseException | None) -> None:
        """After an unforeseen error delete the folder if nothing in it can be resumed, and else say that it is kept."""
        if not isinstance(error, Exception):
            return
        if self.state_file.is_file():
            error.add_note(f"{self.folder} is kept; --resume goes on from it, --force starts over")
        else:
            self.discard()

    def publish(self, *, finished: bool = True) -> None:
        self.state_file.unlink()  # first: a partly deleted work folder must not be resumed
        super().publish(finished=finished)


def require_finished(folder: Path) -> None:
    """Raises CheckpointError where there is no `folder` yet, only the work of the run that writes it."""
    if not folder.exists() and (partial := folder.with_name(folder.name + PARTIAL)).is_dir():
        raise CheckpointError(
            f"{folder} is unfinished, there is only {partial}: run the command that writes it again, a conversion or "
            "healing with --resume"
        )


def require_outside(output: Path, *read: Path | None) -> None:
    """Raises OutputError where `output` would lie in the folder of a model that the command reads."""
    for folder in read:
        # Beside a GGUF file there may be others.
        is_model = folder is not None and any((folder / name).is_file() for name in KINDS)
        if folder and is_model and output.resolve().is_relative_to(folder.resolve()):
            raise OutputError(
                f"{output} is inside {folder}, which is only read; choose another folder with -o"
            )


def check_free(output: Path, force: bool, *read: Path | None) -> None:
    """Check that `output` may be written.

    Args:
        force: allow to replace an existing checkpoint.
        read: folders that the command reads; `output` must not contain them, nor lie in a model's folder.

    Raises:
        OutputError: `output` exists and may not be replaced.
    """
    if not output.name or output.name == ".." or output.is_mount():
        raise OutputError(f"'{output}' cannot be replaced as a whole; name a folder of its own with -o")
    if len(os.fsencode(output.name)) > LONGEST_NAME:
        raise OutputError(
            f"the name of {output} is too long: it may have {LONGEST_NAME} bytes; choose another with -o"
        )
    recover(output)
    if os.path.lexists(output) and not force:
        raise OutputError(f"{output} exists; choose another folder with -o, or replace it with --force")
    if os.path.lexists(output) and not output.is_dir():
        raise OutputError(f"{output} is no folder; choose another name with -o")
    if any(folder and folder.resolve().is_relative_to(output.resolve()) for folder in read):
        raise OutputError(
            f"{output} is read by this command, or holds what is; choose another folder with -o"
        )
    require_outside(output, *read)
    if output.is_symlink():
        raise OutputError(
            f"{output} is a link to {output.resolve()}; name that folder with -o, or remove the link"
        )
    has_files = os.path.lexists(output) and any(output.iterdir())
    if has_files and not any((output / name).is_file() for name in KINDS) and kind_of(output) is None:
        raise OutputError(f"{output} is no checkpoint, and --force replaces nothing else; choose another -o")
