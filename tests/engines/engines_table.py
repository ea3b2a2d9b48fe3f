"""The rows of benchmarks/engines.json that a run of these tests has made."""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path
from typing import Any


class EnginesTable:
    """Rows of one run."""

    def __init__(self) -> None:
        self._rows: list[dict[str, Any]] = []

    def add(self, form: str, engine: dict[str, Any], **found: Any) -> None:
        """A run of `form`.

        Args:
            engine: its name (vLLM where there is none), version and device.
            found: difference of log-probabilities, cache (bytes a token) and share (of the donor's); or refused (why).
        """
        row = {"form": form, "engine": engine.get("name", "vLLM"), "version": engine["version"]}
        self._rows.append(row | {"device": engine["device"], "date": str(date.today())} | found)

    def write(self, path: Path) -> None:
        """Put the rows into the file in the place of older ones of the same engine and form."""
        table = json.loads(path.read_text(encoding="utf-8"))
        new = {(row["engine"], row["form"]): row for row in self._rows}
        kept = [new.pop((row["engine"], row["form"]), row) for row in table["rows"]]
        head = json.dumps(table | {"rows": []}, indent=2, ensure_ascii=False).removesuffix("[]\n}")
        rows = ",\n".join(f"    {json.dumps(row, ensure_ascii=False)}" for row in [*kept, *new.values()])
        path.write_text(f"{head}[\n{rows}\n  ]\n}}\n", encoding="utf-8")
