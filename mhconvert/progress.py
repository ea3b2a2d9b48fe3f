"""Progress events of a long run."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """A progress event: `done` of `total` units of `stage` are finished.

    The stages of each command, in order, with their units:
        convert: donor, calibrate (tokens), search (of a tolerance's budget), survey (decoder layers),
            layers (decoder layers), verify, done.
        heal: donor, text, measure, blocks (layers), heal (tokens), measure, verify, done.
        merge, export of an adapter: donor, merge (tensors) or export (modules), done.
        export: donor, measure, write (layers), verify, done.
        eval: donor, checkpoint, tasks (rows of the task named in the message), done.
        push: push (steps).
        run: stage, before the events of each part of the recipe.

    Attributes:
        message: text for people.
        error: relative squared error of the layer just finished, if there is one.
    """

    stage: str
    done: int
    total: int
    message: str = ""
    error: float | None = None


Listener = Callable[[Progress], None]


def ignore(_: Progress) -> None:
    """A listener that does nothing."""
