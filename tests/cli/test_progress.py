"""Progress away from a terminal: a line a layer, tenths elsewhere, time left from the pace of this run."""

from __future__ import annotations

import io

import pytest

from mhconvert.cli.progress import Pace, PlainLines, describe, progress
from mhconvert.progress import Progress, StageClock


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


def test_a_stage_lasts_until_another_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    now, seen = [0.0], []
    monkeypatch.setattr("mhconvert.progress.time.perf_counter", lambda: now[0])
    clock = StageClock(seen.append)

    def pass_time(seconds: float) -> None:
        now[0] += seconds

    for stage, seconds in (("donor", 1), ("layers", 2), ("layers", 4), ("verify", 8), ("layers", 16)):
        clock(Progress(stage, 0, 1))
        pass_time(seconds)
    clock.timed("layers: fit", pass_time)(32)
    assert clock.stop() == {"donor": 1, "layers": 54, "verify": 8, "layers: fit": 32}
    assert [event.stage for event in seen] == ["donor", "layers", "layers", "verify", "layers"]
