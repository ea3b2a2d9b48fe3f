"""The table of families says what the checks say, and README.md holds it as it is printed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mhconvert.convert.families.facts import FAMILIES
from mhconvert.convert.families.table import family_table, markdown
from mhconvert.convert.methods.registry import METHOD_NAMES

README = Path(__file__).parents[3] / "README.md"


def test_every_family_has_a_row_and_a_verdict_for_every_method() -> None:
    table = family_table()
    assert [row["family"] for row in table] == sorted(FAMILIES)
    for row in table:
        assert set(METHOD_NAMES) <= set(row["methods"])
        assert all(verdict.startswith(("exact", "refused: ")) for verdict in row["methods"].values())
    rows = {row["family"]: row for row in table}
    assert rows["gemma3_text"]["methods"]["mla"] == "exact + G"
    assert rows["olmo2"]["methods"]["mla"] == "exact + 1"
    assert rows["llama"]["methods"]["mla"] == "exact"
    assert "soft-caps" in rows["gemma2"]["carried"]
    assert rows["stablelm"]["refused"] == ["qk_layernorm"]


def test_the_readme_holds_the_table() -> None:
    text = README.read_text(encoding="utf-8")
    held = text.split("<!-- families -->\n")[1].split("<!-- /families -->")[0]
    assert held.strip() == markdown(family_table()), "run: mhconvert donors --families"


def test_the_command_prints_it(main: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main("donors", "--families") == 0
    assert capsys.readouterr().out.strip() == markdown(family_table())
    assert main("donors", "--families", "--json") == 0
    assert json.loads(capsys.readouterr().out)["families"] == family_table()
