"""The folder of a result that is only a step to another: OUT.unhealed of a conversion that is then healed into OUT, and
OUT.step1 … of a chain of conversions."""

from __future__ import annotations

import glob
import os
from pathlib import Path

from mhconvert.errors import OutputError

from .output_folder import check_free
from .ownership import delete, is_blank, kind_of, unmark
from .publishing import recover

UNHEALED = ".unhealed"


def unhealed(output: Path) -> Path:
    """OUT.unhealed."""
    return output.with_name(output.name + UNHEALED)


def numbered(output: Path, count: int, passes: int) -> Path:
    """Where pass `count` of so many passes writes: OUT.step<count>, the last of them OUT itself."""
    return output if count == passes else output.with_name(f"{output.name}.step{count}")


def check_step(output: Path, step: Path, *read: Path | None, resume: bool, force: bool) -> None:
    """Check that a run may write `step` and then `output`; what was moved aside by a killed run is put back.

    Args:
        read: folders that the command reads, which neither of them may replace.

    Raises:
        OutputError: one of them exists; `step` may where it is marked as ours and is resumed or replaced.
    """
    check_free(output, force, *read)
    recover(step)
    if not os.path.lexists(step):
        return
    if kind_of(step) is None and not is_blank(step):
        raise OutputError(f"{step} is not the work of mhconvert; move it away, or choose another -o")
    if not resume and not force:
        left = "that is not healed yet; --resume heals it"
        if step != unhealed(output):
            left = "that is a step of a chain; --resume goes on from it"
        raise OutputError(f"{step} holds a conversion {left}, --force starts over")


def remove_step(step: Path) -> None:
    """Delete `step`, if it is ours."""
    if kind_of(step) is not None:
        delete(step)


def end_chain(output: Path, donor: str) -> None:
    """What is left to do where a chain's OUT has its name, if only because an earlier run was killed just then.

    OUT loses its mark, and every OUT.step<N> of ours is deleted, of a shorter or longer chain too; but not the `donor`.
    """
    unmark(output)
    for step in output.parent.glob(f"{glob.escape(output.name)}.step*"):
        number = step.name.removeprefix(f"{output.name}.step")
        if number.isdecimal() and step.resolve() != Path(donor).expanduser().resolve():
            remove_step(step)


def lasting_name(checkpoint: str, output: Path) -> str:
    """How a record calls the checkpoint that was healed into `output`: a step to it is gone afterwards."""
    return str(output) if Path(checkpoint) == unhealed(output) else checkpoint
