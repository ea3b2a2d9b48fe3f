"""Whether a disk has room, and the words for a write that failed because it has none."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

from safetensors import SafetensorError

from mhconvert.errors import OutputError

from .byte_size import shown_size

FULL = "the disk is full"
# safetensors and torch.save tell of a full disk in words alone; the last two are torch.save's.
SIGNS = {
    "No space left": FULL,
    "quota exceeded": "the disk quota is used up",
    "File too large": "a file has reached the largest size that is allowed (ulimit -f, or the file system's limit)",
    "PytorchStreamWriter failed": FULL,
    "unexpected pos": FULL,
}
ERRORS = {
    errno.ENOSPC: SIGNS["No space left"],
    errno.EDQUOT: SIGNS["quota exceeded"],
    errno.EFBIG: SIGNS["File too large"],
}


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


def out_of_space(error: BaseException | None) -> str | None:
    """What `error`, from a write, says has run out: the disk, a quota, the size of a file. None for other errors."""
    if not isinstance(error, (OSError, SafetensorError, RuntimeError)):
        return None
    said = str(error)
    return ERRORS.get(getattr(error, "errno", None) or 0) or next(
        (words for sign, words in SIGNS.items() if sign in said), None
    )
