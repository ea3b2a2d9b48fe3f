"""Progress on stderr: a live bar on a terminal, plain lines elsewhere, nothing when quiet."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TextIO

from mhconvert.errors import MhconvertError
from mhconvert.progress import Listener, Progress, ignore

from ..eval.report.units import duration
from .plain_text import plain

NAMES = {
    "donor": "opening the donor",
    "calibrate": "calibration text",
    "search": "looking for the budget",
    "survey": "what each layer needs",
    "layers": "layers",
    "text": "reading text",
    "measure": "measuring on held-out rows",
    "blocks": "layers one by one",
    "heal": "healing, tokens",
    "merge": "merging",
    "export": "exporting",
    "write": "layers written",
    "push": "pushing",
    "stage": "stage",
    "verify": "checking in a bare process",
    "checkpoint": "opening",
    "tasks": "measuring",
    "heads": "heads left out",
    "speed": "decode steps",
}
NAMED = ("tasks", "heads")  # stages of several parts, each counted anew and told by the message
EACH = ("layers", "blocks")  # stages of which every step has a line of its own; others one a tenth


@contextmanager
def progress(quiet: bool) -> Iterator[Listener]:
    """Yield a listener that shows the progress it is told, for as long as the context lasts.

    An error that nobody foresaw gets a note of what was being done.
    """
    told: list[Progress] = []
    with _shown(quiet) as show:

        def listener(event: Progress) -> None:
            told[:] = [event]
            show(event)

        try:
            yield listener
        except Exception as error:
            if told and not isinstance(error, MhconvertError):
                error.add_note(f"while: {describe(told[0], None)}")
            raise


@contextmanager
def _shown(quiet: bool) -> Iterator[Listener]:
    if quiet:
        yield ignore
    elif sys.stderr.isatty():
        with _live() as listener:
            yield listener
    else:
        yield PlainLines(sys.stderr)


@dataclass
class Pace:
    """Estimates the time left in a stage from its speed since the first event; a resumed stage does not start at 0."""

    stage: str = ""
    begun: float = 0.0
    first: int = 0

    def left(self, event: Progress, now: float) -> float | None:
        """Seconds, or None while nothing is known."""
        stage = f"{event.stage} {event.message}" if event.stage in NAMED else event.stage
        if stage != self.stage:
            self.stage, self.begun, self.first = stage, now, event.done
        finished = event.done - self.first
        if finished <= 0 or event.done >= event.total:
            return None
        return (now - self.begun) / finished * (event.total - event.done)


@dataclass
class PlainLines:
    """Prints one line for each event, and where there are many steps one for each tenth."""

    stream: TextIO
    pace: Pace = field(default_factory=Pace)
    last: tuple[str, int, str] = ("", -1, "")

    def __call__(self, event: Progress) -> None:
        left = self.pace.left(event, time.monotonic())
        tenth = 10 * event.done // max(event.total, 1)
        key = (event.stage, event.done if event.stage in EACH else tenth, event.message)
        if key == self.last:
            return
        self.last = key
        line = describe(event, left)
        if line:
            print(line, file=self.stream, flush=True)


def describe(event: Progress, left: float | None) -> str:
    """`layers 3/30 · relative error 0.0123 · 0:41 left`; empty when there is nothing to say."""
    parts = []
    if event.stage != "done":
        counted = f" {event.done:,}/{event.total:,}" if event.total > 1 else ""
        parts.append(NAMES.get(event.stage, event.stage) + counted)
    if event.error is not None:
        parts.append(f"relative error {event.error:.4f}")
    if event.message:
        parts.append(event.message)
    if left is not None:
        parts.append(f"{duration(left)} left")
    return plain(" · ".join(parts))


@contextmanager
def _live() -> Iterator[Listener]:
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bars

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Bars(
        *columns, TextColumn("{task.fields[note]}"), console=Console(stderr=True), transient=False
    ) as bars:
        tasks: dict[str, Any] = {}
        pace = Pace()

        def listener(event: Progress) -> None:
            left = pace.left(event, time.monotonic())
            for stage in tasks.keys() - {event.stage}:  # a new stage means that the earlier ones are over
                bars.update(tasks[stage], completed=bars.tasks[tasks[stage]].total)
            if event.stage == "done":
                if event.message:
                    bars.console.print(escape(plain(event.message)), highlight=False)
                return
            if event.stage not in tasks:
                tasks[event.stage] = bars.add_task(NAMES.get(event.stage, event.stage), note="")
            note = describe(Progress("done", 0, 0, event.message, event.error), left)
            bars.update(tasks[event.stage], completed=event.done, total=event.total, note=escape(note))

        yield listener
