"""Progress events of a long run."""

import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any


@dataclass(frozen=True)
class Progress:
    """A progress event: `done` of `total` units of `stage` are finished.

    The stages of each command, in order, with their units:
        convert: donor, calibrate (tokens), search (of a tolerance's budget), survey (decoder layers,
            forward and backward), layers (decoder layers), search (texts, of a tolerance on generation), verify, done.
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


class StageClock:
    """A listener that passes events on and adds up the seconds of each stage.

    A stage lasts from its first event to the first of another one.

    Attributes:
        seconds: by stage, and by `timed` part of one.
    """

    def __init__(self, listener: Listener):
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._listener, self._stage, self._since = listener, "", time.perf_counter()

    def __call__(self, event: Progress) -> None:
        self.stop()
        self._stage = event.stage
        self._listener(event)

    def stop(self) -> dict[str, float]:
        """Count the stage of the last event up to now; returns `seconds`."""
        now = time.perf_counter()
        if self._stage:
            self.seconds[self._stage] += now - self._since
        self._since = now
        return dict(self.seconds)

    def timed(self, part: str, work: Callable[..., Any]) -> Callable[..., Any]:
        """`work`, whose seconds are counted as those of `part` too."""

        @wraps(work)
        def counted(*arguments: Any, **options: Any) -> Any:
            begun = time.perf_counter()
            try:
                return work(*arguments, **options)
            finally:
                self.seconds[part] += time.perf_counter() - begun

        return counted
