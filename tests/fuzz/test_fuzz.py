"""Damaged inputs are refused in words or used; a short run with fixed seeds, and everything that was once found."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mhconvert.eval import inspection

from .edits import Edit
from .kinds import KINDS, attempt

EXAMPLES = int(os.environ.get("MHCONVERT_FUZZ", "3"))
FOUND = sorted((Path(__file__).parent / "corpus").glob("*.json"))


@pytest.mark.parametrize("name", KINDS)
def test_damage_is_refused_in_words_or_harmless(name: str) -> None:
    @settings(
        max_examples=EXAMPLES,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.lists(KINDS[name].edits, min_size=1, max_size=3))
    def damaged(edits: list[Edit]) -> None:
        assert attempt(name, edits) in ("accepted", "refused")

    damaged()


@pytest.mark.parametrize("name", KINDS)
def test_what_is_whole_is_accepted(name: str) -> None:
    assert attempt(name, []) == "accepted"


@pytest.mark.parametrize("file", FOUND, ids=[file.stem for file in FOUND])
def test_what_was_found_once(file: Path) -> None:
    """corpus/KIND-….json: the edits, and the verdict that is right for them."""
    kept: dict[str, Any] = json.loads(file.read_text())
    assert attempt(file.stem.partition("-")[0], kept["edits"]) == kept["verdict"]


def test_an_error_that_nobody_foresaw_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(inspection, "inspect", broken)
    with pytest.raises(AssertionError, match="shapes differ"):
        attempt("config", [])
