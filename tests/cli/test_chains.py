"""Chains on the command line: whose options they have, what is refused with which exit code, and the printed plan."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mhconvert.convert.layer_pass import time_estimate
from tests.conftest import Cli
from tests.donors import TEXT, make_donor


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ("--to dha+moo", 2, "'moo' is not a method; choose one of mla, dha, moh"),
        ("--to mla --then moo", 2, "Invalid value for '--then': 'moo' is not a method"),
        ("--to dha+moh --window 16", 2, "--window does not apply to dha+moh"),
        ("--to mla --r-par 2", 2, "--r-par does not apply to mla"),
        ("--to swa+mla --kv-budget 0.5", 2, "--kv-budget is of mla and swa, for each something else"),
        ("--to dha+moh --uniform", 2, "--uniform is of dha and moh, for each something else"),
        ("--to dha+moh --survey", 2, "--survey goes with --dry-run"),
        ("--to moh+mla", 1, "mla (coded) cannot follow moh: routers choose among heads"),
        ("--to mla+dha", 1, "dha cannot follow mla (coded): both rewrite keys and values"),
        (
            "--to mla+moh --kv-bits 8",
            1,
            "take latents of 16-bit elements: --to mla --kv-bits 16, and then moh",
        ),
        ("--to hydra --then moh", 1, "an adapter lies beside a model and comes last"),
        (
            "--to dha+moh --tolerance kl=0.1",
            1,
            "of the first step alone, with --to dha --tolerance kl=0.1 and whatever else",
        ),
        (
            "--to mla+moh --tolerance kl=0.1",
            1,
            "with --to mla --kv-bits 16 --tolerance kl=0.1 and whatever else",
        ),
    ],
)
def test_what_is_refused(words: str, code: int, said: str, here: Cli) -> None:
    done = here("nothing", *words.split(), COLUMNS="400")
    assert done.returncode == code
    assert said in done.stderr
    assert done.stdout == ""


def test_help_has_the_options_of_each_step(here: Cli) -> None:
    said = here("nothing", "--to", "dha", "--then", "moh+hydra", "--help").stdout
    for heading in ("Options of dha:", "Options of dha, moh:", "Options of moh:", "Options of hydra:"):
        assert f"\n{heading}\n" in said
    assert "--window" not in said
    assert "--resume" in said


def test_the_plan_says_why_latents_have_elements(
    here: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time_estimate, "PROBE_SECONDS", 1e-4)
    donor = make_donor(tmp_path / "donor", heads=4, kv_heads=2, hidden=32)
    done = here(donor, "--to", "mla+moh", "-o", tmp_path / "out", "--dry-run", "--json")
    first, last = json.loads(done.stdout)["steps"]
    assert first["notice"] == (
        "the cache has elements of 16 bits (--kv-bits 16): moh, which follows, takes no codes"
    )
    assert "notice" not in last


def test_a_survey_is_of_the_first_step(here: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time_estimate, "PROBE_SECONDS", 1e-4)
    donor = make_donor(tmp_path / "donor", heads=4, kv_heads=2, hidden=32)
    (tmp_path / "text.jsonl").write_text(12 * f"{json.dumps({'text': TEXT})}\n", encoding="utf-8")
    words = "--to swa+moh --sinks none --window 16 --context 64 --kv-budget 0.75 --dry-run --survey --json"
    text = f"--calibration {tmp_path}/text.jsonl --calibration-tokens 256 --sequence-length 64 --held-out 2"
    page = tmp_path / "page.md"
    done = here(donor, *words.split(), *text.split(), "-o", tmp_path / "out", "--report", page)
    plan = json.loads(done.stdout)
    surveyed, planned = (step["layers"] for step in plan["steps"])
    assert all(layer["costs"]["windowed"] > 0 for layer in surveyed)
    assert not any("costs" in layer for layer in planned)
    assert plan["notice"] == (
        "the survey is of swa, the first step; what follows is planned on equal parts of its budget"
    )
    assert "is worth, with swa and 62.5 %" in page.read_text(encoding="utf-8").splitlines()[0]
    assert {path.name for path in tmp_path.iterdir()} == {"donor", "text.jsonl", "page.md"}


def test_the_plan_of_a_chain(here: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time_estimate, "PROBE_SECONDS", 1e-4)
    donor = make_donor(tmp_path / "donor", heads=4, kv_heads=2, hidden=32)
    words = [donor, "--to", "dha+moh", "--then", "hydra", "-o", tmp_path / "out", "--dry-run", "--r-par", "3"]
    words += ["--protect", "retrieval"]  # which means the same for both
    said = here(*words, "--kv-budget", "0.75", "--active", "0.5").stdout
    titles = [line for line in said.splitlines() if "→" in line and "nothing was written" in line]
    assert [line.replace(f"{tmp_path}/", "") for line in titles] == [
        "donor → out.step1 (nothing was written)",
        "out.step1 → out (nothing was written)",
        "donor → out (nothing was written)",
        "out → out-hydra (nothing was written) (Hydra, untrained)",
    ]
    assert said.count("│ 256 B → 192 B │") == 2  # of the first step, and of the whole
    assert "4 of 8" in said
    assert "r_par 3" in said
    assert [path.name for path in tmp_path.iterdir()] == ["donor"]
