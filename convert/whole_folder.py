"""A folder that is written in one go: it appears when it is whole."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from mhconvert.convert.checkpoint import check_space, replace_folder
from mhconvert.convert.errors import OutputError
from mhconvert.convert.partial import PartialFolder, disk_full


@contextmanager
def whole_folder(output: Path, needed: int, *, force: bool) -> Iterator[Path]:
    """OUT.partial to write into. It becomes `output` when the context ends well; otherwise nothing is left.

    Whether `output` may be replaced was asked before (`checkpoint.check_free`). needed: bytes.
    Raises OutputError when the disk is too small, or OUT.partial is there already; `force` removes what a run that
    was cut short left of it.
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
        shutil.rmtree(partial.work)
        replace_folder(partial.folder, output)
    except BaseException as error:
        partial.discard()
        if isinstance(error, (OSError, SafetensorError)) and disk_full(error):
            raise OutputError(
                f"the disk of {output} is full; free some space, or choose another -o"
            ) from error
        raise
    finally:
        partial.unlock()
