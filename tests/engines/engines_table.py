"""The rows of benchmarks/engines.json that a run of these tests has made."""

from __future__ import annotations

import json
import subprocess
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


class EnginesTable:
    """Rows of one run, and what it found to be no longer so."""

    def __init__(self) -> None:
        self._rows: list[dict[str, Any]] = []
        self._failed: set[tuple[str, str]] = set()
        self._whole: set[str] = set()

    def add(self, form: str, engine: dict[str, Any], **found: Any) -> None:
        """A run of `form`.

        Args:
            engine: its name (vLLM where there is none), version and device.
            found: difference of log-probabilities, cache (bytes a token) and share (of the donor's); or refused (why).
        """
        row = {"form": form, "engine": engine.get("name", "vLLM"), "version": engine["version"]}
        self._rows.append(row | {"device": engine["device"], "date": str(date.today())} | found)

    def failed(self, engine: str, form: str) -> None:
        """The test of a form failed: no row of it stays."""
        self._failed.add((engine, form))

    def whole(self, engine: str) -> None:
        """Every test of the engine ran: rows that none of them made anew do not stay."""
        self._whole.add(engine)

    def write(self, path: Path) -> None:
        """Put the rows into the file in the place of older ones of the same engine and form.

        The file's commit and date become those of this run; rows that stay keep theirs.
        """
        if not (self._rows or self._failed or self._whole):
            return
        table = json.loads(path.read_text(encoding="utf-8"))
        new = {_key(row): row for row in self._rows if _key(row) not in self._failed}
        stay = [row for row in table["rows"] if _key(row) in new or not self._gone(row)]
        older = {key: table[key] for key in ("commit", "date")}
        rows = [new.pop(_key(row), None) or older | row for row in stay]
        head = table | {"rows": [], "commit": commit(), "date": str(date.today())}
        text = json.dumps(head, indent=2, ensure_ascii=False).removesuffix("[]\n}")
        lines = ",\n".join(f"    {json.dumps(row, ensure_ascii=False)}" for row in [*rows, *new.values()])
        path.write_text(f"{text}[\n{lines}\n  ]\n}}\n", encoding="utf-8")

    def _gone(self, row: dict[str, Any]) -> bool:
        return _key(row) in self._failed or row["engine"] in self._whole


def _key(row: dict[str, Any]) -> tuple[str, str]:
    return row["engine"], row["form"]


def commit() -> str:
    """The state of the repository that is tested."""
    asked = ["git", "-C", str(ROOT), "rev-parse", "--short=7", "HEAD"]
    return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
