"""What a survey of the heads reports while it runs."""

from __future__ import annotations

import itertools
from pathlib import Path

from mhconvert.eval.heads.survey import ROWS, SET, Asked, survey
from mhconvert.progress import Progress
from tests.donors import make_donor


def test_every_part_reports_each_of_its_steps(tmp_path: Path) -> None:
    """Also the set's: each further head is looked for on every request. None stands at its total and goes on."""
    donor = make_donor(
        tmp_path / "donor", layers=6, heads=8
    )  # 48 heads: 5 % are three, as many as the set has
    prompts = tmp_path / "requests.txt"
    prompts.write_text("Pick a lock.\nCopy a key.\n", encoding="utf-8")
    events: list[Progress] = []
    survey(str(donor), Asked(prompts=prompts), "cpu", False, events.append)
    parts = {
        name: [(event.done, event.total) for event in of]
        for name, of in itertools.groupby(
            (event for event in events if event.stage == "heads" and event.message),
            lambda event: event.message,
        )
    }
    steps = {
        "retrieval": 6,
        "repetition": 1,
        "successor": 1,
        "importance": 2 * ROWS,
        "safety": (2 + SET - 1) * 2,
    }
    assert list(parts) == list(steps)
    for name, total in steps.items():
        assert parts[name] == [(done, total) for done in range(1, total + 1)]
