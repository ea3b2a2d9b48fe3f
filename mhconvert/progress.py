"""What a long run tells whoever watches it."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """`done` of `total` units of `stage` are finished; `message` is for people.

    Stages in order: "donor", "calibrate" (unit: tokens), "search" (of a tolerance's budget), "survey" (of the layers'
    needs) and "layers" (unit: decoder layers), "verify", "done"; or, with an adapter, "donor", "merge" (unit: tensors)
    or "export" (unit: modules), "done"; or, exporting, "donor", "measure", "write" (unit: layers), "verify", "done";
    or, healing, "donor", "text", "measure", "blocks" (unit: layers), "heal" (unit: tokens), "measure", "verify",
    "done"; or, evaluating, "donor", "checkpoint", "tasks" (unit: rows of the task that the message names), "done"; or
    "push" (unit: steps); before each part of a recipe's run, "stage".
    `error` is the relative squared error of the layer just finished, where there is one.
    """

    stage: str
    done: int
    total: int
    message: str = ""
    error: float | None = None


Listener = Callable[[Progress], None]


def ignore(_: Progress) -> None:
    """A listener that shows nothing."""
