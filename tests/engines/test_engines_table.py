"""The file of the engines' table after a run: new rows, older ones, and those that are no longer so."""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path

import pytest

from tests.engines.engines_table import EnginesTable, commit

VLLM = {"version": "0.32.0", "device": "cpu"}
LLAMA = {"name": "llama.cpp", "version": "b1", "device": "cpu"}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    rows = [
        {"form": form, "engine": engine, "version": "old", "device": "cpu"}
        for engine in ("vLLM", "llama.cpp")
        for form in ("a", "b", "c")
    ]
    path = tmp_path / "engines.json"
    path.write_text(json.dumps({"commit": "0000000", "date": "2026-01-01", "rows": rows}), encoding="utf-8")
    return path


def _rows(file: Path) -> dict[str, str]:
    return {f"{row['engine']} {row['form']}": row["version"] for row in json.loads(file.read_text())["rows"]}


def test_new_rows_take_the_place_of_older_ones_and_the_head_is_renewed(file: Path) -> None:
    table = EnginesTable()
    table.add("b", VLLM, difference=1e-5)
    table.add("new", LLAMA)
    table.write(file)
    found = json.loads(file.read_text())
    assert (found["commit"], found["date"]) == (commit(), str(date.today()))
    assert _rows(file)["vLLM b"] == "0.32.0"
    assert list(_rows(file))[-1] == "llama.cpp new"
    assert found["rows"][0]["commit"] == "0000000"  # of the run that made it
    assert "commit" not in found["rows"][1]


def test_a_form_whose_test_fails_loses_its_row(file: Path) -> None:
    table = EnginesTable()
    table.add("a", VLLM)
    table.failed("vLLM", "b")
    table.write(file)
    assert "vLLM b" not in _rows(file)
    assert "llama.cpp b" in _rows(file)


def test_a_whole_run_leaves_no_older_row_of_its_engine(file: Path) -> None:
    table = EnginesTable()
    table.add("a", LLAMA)
    table.whole("llama.cpp")
    table.write(file)
    assert [name for name in _rows(file) if name.startswith("llama")] == ["llama.cpp a"]
    assert len(_rows(file)) == 4


def test_a_run_of_nothing_changes_nothing(file: Path) -> None:
    before = file.read_bytes()
    EnginesTable().write(file)
    assert file.read_bytes() == before
