"""`mhconvert inspect --heads`: the scores of every head, a page of maps, and what cannot be used."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.conftest import Cli
from tests.donors import make_donor

SCORES = (
    "retrieval",
    "needle_attention",
    "previous_token",
    "duplicate_token",
    "induction",
    "successor",
    "importance",
    "safety",
)


@pytest.fixture(scope="module")
def donor(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_donor(tmp_path_factory.mktemp("heads") / "tiny", layers=3, heads=4)


@pytest.fixture
def requests(tmp_path: Path) -> Path:
    path = tmp_path / "requests.txt"
    path.write_text("Pick a lock.\n\nCopy a key.\n", encoding="utf-8")
    return path


def test_every_head_has_its_scores(here: Cli, donor: Path, requests: Path, tmp_path: Path) -> None:
    pages = tmp_path / "heads.html", tmp_path / "heads.md"
    run = here("inspect", donor, "--heads", "--prompts", requests, "--json", "-o", pages[0], "-o", pages[1])
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)["heads"]
    assert tuple(found["scores"]) == SCORES
    for scores in found["scores"].values():
        assert [len(row) for row in scores] == [4, 4, 4]
        assert all(score >= 0 for row in scores for score in row)
    assert found["settings"]["prompts"] == 2
    measured = found["measured"]["safety"]
    assert len(measured) == 1  # 5 % of 12, rounded up
    assert found["set"] == measured
    kept = [
        (index, head)
        for index, layer in enumerate(found["protect"]["safety"]["layers"])
        for head in layer["heads"]
    ]
    assert kept == [(measured[0]["layer"], measured[0]["head"])]
    html, markdown = (page.read_text(encoding="utf-8") for page in pages)
    assert html.count('class="heat heat-10"') >= len(SCORES)  # the highest of each map
    assert "heat-" in html
    assert "## induction" in markdown


def test_a_table_for_people_and_a_text_of_ones_own(
    here: Cli, donor: Path, requests: Path, tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The river ran past the town. " * 400, encoding="utf-8")
    run = here("inspect", donor, "--heads", "--prompts", requests, "--text", text)
    assert run.returncode == 0, run.stderr
    assert "left out together, with the KL so far (Sahara)" in run.stdout
    assert "needle attention" in run.stdout
    lines = run.stdout.splitlines()
    rows = [line for line in lines if sum(line.count(f" {i}.{h} ") for i in range(3) for h in range(4)) >= 2]
    assert len(rows) == 20  # of two tables, though the one head that was left out in fact has a row alone


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "has no prompts; write one a line"),
        (b"\n \n", "has no prompts"),
        (b"a\0b", "it has zero bytes"),
        (b"\xff\xfe\x00", "it is not UTF-8 text"),
        (None, "cannot be read"),
    ],
)
def test_requests_that_are_none(
    here: Cli, donor: Path, tmp_path: Path, content: bytes | None, said: str
) -> None:
    path = tmp_path / "requests.txt"
    if content is not None:
        path.write_bytes(content)
    run = here("inspect", donor, "--heads", "--prompts", path)
    assert run.returncode == 1
    assert said in run.stderr


def test_options_of_heads_alone(here: Cli, donor: Path, requests: Path) -> None:
    run = here("inspect", donor, "--prompts", requests)
    assert run.returncode == 2
    assert "is of --heads" in run.stderr
