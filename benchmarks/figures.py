"""Fills the tables of README.md and docs/, and draws docs/img, from the JSON files beside this script.

`figures.py` writes; `figures.py --check` writes nothing and exits 1 if a page or a plot is not what the data gives.
benchmarks/README.md describes the files and the markers.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from decimal import Decimal
from pathlib import Path
from string import Formatter
from typing import Any

from quality_curve import draw, fingerprint

ROOT = Path(__file__).resolve().parents[1]
REGION = re.compile(r"^<!-- figure: ([^\n]+?) -->\n(.*?)^<!-- /figure -->$", re.MULTILINE | re.DOTALL)
MARKER = re.compile(r"^<!-- (?:figure: |/figure)", re.MULTILINE)
PER_ROW = ("command", "commit", "date", "machine")  # a row says them where it differs from its file
PLOT = Path("docs/img/quality_curve.svg")

Row = dict[str, Any]
Figures = dict[str, dict[str, Any]]


class FigureError(Exception):
    """A marker or a data file that cannot be used: what is wrong, and what there is instead."""


def load(root: Path = ROOT) -> Figures:
    """The data files by the stems of their names. Numbers keep the digits that the file has: 25.90 stays 25.90."""
    return {
        path.stem: json.loads(path.read_text(encoding="utf-8"), parse_float=Decimal)
        for path in sorted((root / "benchmarks").glob("*.json"))
    }


def provenance(figure: dict[str, Any], row: Row) -> Row:
    """The command, commit, date and machine of `row`: its own, or its file's where it has none."""
    return {key: row.get(key, figure[key]) for key in PER_ROW}


def cell(column: dict[str, str], row: Row) -> str:
    """The row's text in a column: empty where the row lacks a key of the column's template."""
    template = column.get("format", f"{{{column['key']}}}")
    needed = [name for _, name, _, _ in Formatter().parse(template) if name]
    if not all(name in row for name in needed):
        return ""
    text = template.format(**row).replace("|", "\\|")
    if all(isinstance(row[name], str) for name in needed):
        return text
    return re.sub(r"(?<![\w.])-(?=\d)", "−", text)


def table(figures: Figures, spec: str) -> str:
    """The Markdown table that a marker asks for: NAME, or NAME:key=value|value,columns=key|key."""
    name, _, choice = spec.partition(":")
    if name not in figures:
        raise FigureError(f"there is no figure '{name}'; there are {', '.join(figures)}")
    figure = figures[name]
    rows, columns = figure["rows"], figure["columns"]
    for part in filter(None, choice.split(",")):
        key, _, wanted = part.partition("=")
        values = wanted.split("|")
        if key == "columns":
            columns = _columns(figure, name, values)
        else:
            known = {str(row[key]) for row in figure["rows"] if key in row}
            if not set(values) <= known:
                raise FigureError(
                    f"{name} has no row with {part}; {key} is one of {', '.join(sorted(known))}"
                )
            rows = [row for row in rows if str(row.get(key)) in values]
    if not rows:
        raise FigureError(f"no row of {name} is left by '{choice}'")
    return _markdown(figure, rows, columns)


def _columns(figure: dict[str, Any], name: str, keys: list[str]) -> list[dict[str, str]]:
    known = {column["key"]: column for column in figure["columns"]}
    known |= {key: {"key": key, "label": key} for key in PER_ROW}
    unknown = [key for key in keys if key not in known]
    if unknown:
        raise FigureError(f"{name} has no column '{unknown[0]}'; there are {', '.join(known)}")
    return [known[key] for key in keys]


def _markdown(figure: dict[str, Any], rows: list[Row], columns: list[dict[str, str]]) -> str:
    """Without columns that have no value."""
    body = []
    for row in rows:
        full = row | provenance(figure, row)
        full["command"] = "<br>".join(f"`{line}`" for line in full["command"])
        body.append([cell(column, full) for column in columns])
    shown = [n for n in range(len(columns)) if any(cells[n] for cells in body)]
    words = [
        columns[n]["key"] in PER_ROW or any(isinstance(row.get(columns[n]["key"]), str) for row in rows)
        for n in shown
    ]
    lines = [[columns[n]["label"] for n in shown], ["---" if word else "---:" for word in words]]
    lines += [[cells[n] for n in shown] for cells in body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def fill(text: str, figures: Figures) -> str:
    """The page with each region between its markers made anew."""
    if len(MARKER.findall(text)) != 2 * len(REGION.findall(text)):
        raise FigureError("a figure's marker has no partner: <!-- figure: NAME --> … <!-- /figure -->")
    return REGION.sub(
        lambda found: f"<!-- figure: {found[1]} -->\n\n{table(figures, found[1])}\n\n<!-- /figure -->", text
    )


def stale(root: Path = ROOT) -> dict[Path, str]:
    """Pages and plots that are not what the data gives, each with what belongs there: text, or a plot's fingerprint."""
    figures = load(root)
    found = {}
    for page in (root / "README.md", *sorted((root / "docs").rglob("*.md"))):
        text = page.read_text(encoding="utf-8")
        try:
            filled = fill(text, figures)
        except FigureError as error:
            raise FigureError(f"{page.relative_to(root)}: {error}") from None
        if filled != text:
            found[page] = filled
    plot, expected = root / PLOT, fingerprint(figures)
    if not plot.is_file() or expected not in plot.read_text(encoding="utf-8"):
        found[plot] = expected
    return found


def write(root: Path = ROOT) -> list[Path]:
    """Makes every page and plot what the data gives, and returns those that were not."""
    found = stale(root)
    for path, content in found.items():
        if path == root / PLOT:
            draw(load(root), path)
        else:
            path.write_text(content, encoding="utf-8")
    return list(found)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if anything would change")
    check = parser.parse_args().check
    try:
        paths = list(stale()) if check else write()
    except FigureError as error:
        print(f"figures.py: {error}", file=sys.stderr)
        return 1
    for path in paths:
        print(
            f"{path.relative_to(ROOT)}: {'not what the data gives; run make figures' if check else 'written'}"
        )
    return int(check and bool(paths))


if __name__ == "__main__":
    sys.exit(main())
