"""The report of an evaluation as one page: self-contained HTML without scripts, or Markdown; all names are escaped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from mhconvert.errors import CheckpointError, OutputError

from ...convert.checkpoint.provenance import RECIPE
from ...convert.storage.safetensors_reader import read_json
from ..report.model_card import REPORT
from .blocks import Block, to_html, to_markdown
from .content import blocks
from .style import CSS
from .verdict import conversions, title

SUFFIXES = (".html", ".md")


def html(
    result: Mapping[str, Any], reports: Sequence[Mapping[str, Any]] = (), recipe: str | None = None
) -> str:
    """The page as HTML; equal arguments give equal text.

    The plots need matplotlib. Without it the page has only the tables of their numbers and names the extra.

    Args:
        result: of `mhconvert eval`.
        reports: `report.json` of the models after the donor, in their order; the last ones may be missing.
        recipe: YAML.
    """
    return document(title(result), blocks(result, reports, recipe))


def document(name: str, page: Sequence[Block]) -> str:
    """The blocks as an HTML page with that title."""
    body = "\n".join(map(to_html, page))
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(name)}</title>\n<style>{CSS}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def markdown(
    result: Mapping[str, Any], reports: Sequence[Mapping[str, Any]] = (), recipe: str | None = None
) -> str:
    """The page of `html` as Markdown, with tables instead of the plots."""
    return _plain(blocks(result, reports, recipe))


def _plain(page: Sequence[Block]) -> str:
    return "\n\n".join(filter(None, map(to_markdown, page))) + "\n"


def sources(result: Mapping[str, Any]) -> tuple[list[Mapping[str, Any]], str | None]:
    """(reports, recipe): `report.json` of each model but the donor, {} if it has none, and the first recipe found."""
    reports: list[Mapping[str, Any]] = []
    recipe = None
    for model in conversions(result):
        folder = Path(model["reference"])
        try:
            reports.append(read_json(folder / REPORT))
        except CheckpointError:
            reports.append({})
        file = folder / RECIPE
        if recipe is None and file.is_file():
            recipe = file.read_text(encoding="utf-8")
    return reports, recipe


def check(path: Path) -> None:
    """Check that `write` can write the file, before the evaluation starts.

    Raises:
        OutputError: the ending is unknown, or the file cannot be written there.
    """
    if path.suffix not in SUFFIXES:
        raise OutputError(f"{path} ends in none of {', '.join(SUFFIXES)}; the ending decides what is written")
    if path.is_dir():
        raise OutputError(f"{path} cannot be written: it is a folder")
    if not path.absolute().parent.is_dir():
        raise OutputError(f"{path} cannot be written: there is no folder {path.absolute().parent}")


def write(
    path: Path,
    result: Mapping[str, Any],
    reports: Sequence[Mapping[str, Any]] = (),
    recipe: str | None = None,
) -> None:
    """Write the page to `path` as HTML or Markdown, by its ending .html or .md; an existing file is replaced.

    Raises:
        OutputError: the file cannot be written.
    """
    write_blocks(path, title(result), blocks(result, reports, recipe))


def write_blocks(path: Path, name: str, page: Sequence[Block]) -> None:
    """Write blocks to `path` as `write` does; `name` is the title of an HTML page. Raises OutputError likewise."""
    check(path)
    text = document(name, page) if path.suffix == ".html" else _plain(page)
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror}") from error
