"""Progress away from a terminal: a line a layer, tenths elsewhere, time left from the pace of this run."""

from __future__ import annotations

import io

import pytest

from mhconvert.cli.progress import Pace, PlainLines, describe, progress
from mhconvert.progress import Progress


def test_a_line_says_what_is_known() -> None:
    assert describe(Progress("layers", 3, 30, error=0.01234), 41.4) == (
        "layers 3/30 · relative error 0.0123 · 41.4 s left"
    )
    assert describe(Progress("donor", 0, 1, "x"), None) == "opening the donor · x"
    assert describe(Progress("done", 1, 1), None) == ""
    assert describe(Progress("done", 1, 1, "30 layers in 1:02"), None) == "30 layers in 1:02"


def test_every_layer_but_only_tenths_of_tokens() -> None:
    stream = io.StringIO()
    lines = PlainLines(stream)
    for done in range(1, 1001):
        lines(Progress("calibrate", done, 1000))
    for done in range(1, 31):
        lines(Progress("layers", done, 30, error=0.5))
    text = stream.getvalue()
    assert text.count("calibration text") == 11
    assert text.count("layers ") == 30


def test_time_left_ignores_what_a_resumed_run_found_done() -> None:
    pace = Pace()
    assert pace.left(Progress("layers", 20, 30), 100.0) is None
    assert pace.left(Progress("layers", 22, 30), 104.0) == pytest.approx(16.0)
    assert pace.left(Progress("layers", 30, 30), 120.0) is None
    assert pace.left(Progress("verify", 0, 1), 121.0) is None


def test_quiet_shows_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with progress(quiet=True) as listener:
        listener(Progress("layers", 1, 2))
    assert capsys.readouterr().err == ""
