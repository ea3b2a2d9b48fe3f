"""The table of families says what the checks say, and the docs hold it as it is printed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mhconvert.convert.families.facts import FAMILIES
from mhconvert.convert.methods.family_table import family_table, markdown
from mhconvert.convert.methods.registry import METHOD_NAMES

PAGE = Path(__file__).parents[3] / "docs" / "reference" / "families.md"


def test_every_family_has_a_row_and_a_verdict_for_every_method() -> None:
    table = family_table()
    assert [row["family"] for row in table] == sorted(FAMILIES)
    for row in table:
        assert set(METHOD_NAMES) <= set(row["methods"])
        assert all(
            verdict.startswith(("exact", "approximate", "refused: ")) for verdict in row["methods"].values()
        )
    rows = {row["family"]: row for row in table}
    assert rows["gemma3_text"]["methods"]["mla"] == "exact + G"
    assert rows["olmo2"]["methods"]["mla"] == "exact + 1"
    assert rows["llama"]["methods"]["mla"] == "exact"
    assert "soft-caps" in rows["gemma2"]["carried"]
    assert rows["stablelm"]["refused"] == ["qk_layernorm"]


def test_the_docs_hold_the_table() -> None:
    assert markdown(family_table()) in PAGE.read_text(encoding="utf-8"), "run: python docs/generate.py"


def test_the_command_prints_it(main: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main("donors", "--families") == 0
    assert capsys.readouterr().out.strip() == markdown(family_table())
    assert main("donors", "--families", "--json") == 0
    assert json.loads(capsys.readouterr().out)["families"] == family_table()
