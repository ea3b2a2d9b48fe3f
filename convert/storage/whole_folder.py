"""The output folder of a command that writes at once, and starts over after an interruption."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mhconvert.errors import OutputError

from .disk_space import check_space, out_of_space
from .output_folder import PartialFolder


def require_no_partial(output: Path, *, force: bool) -> PartialFolder:
    """OUT.partial of a run that starts over. Raises OutputError where it is there and may not be replaced."""
    partial = PartialFolder(output, "write")
    if partial.exists and not (force and partial.is_ours):
        hint = "--force starts over" if partial.is_ours else "it is not the work of mhconvert"
        raise OutputError(f"{partial.folder} is there already: {hint}; move it away, or choose another -o")
    return partial


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
    partial = require_no_partial(output, force=force)
    check_space(partial.folder, needed)
    partial.make()
    try:
        partial.empty()
        yield partial.folder
        partial.publish()
    except BaseException as error:
        partial.discard()
        if words := out_of_space(error):
            raise OutputError(
                f"{output} cannot be written: {words}; make room, or choose another -o"
            ) from error
        raise
    finally:
        partial.unlock()
