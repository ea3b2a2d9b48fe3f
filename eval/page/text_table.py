"""Texts that were read, one a row: for the page and the terminal, where there are more than a few."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..report.units import count, number, share
from ..text_spread import MANY, counted
from .blocks import Block, Cell, Heading, Paragraph, Table

Result = Mapping[str, Any]
NOTE = "perplexity, of the others ÷ the donor's; KL is KL(donor ‖ model) in nats a token; ± is one standard error"


def has_table(result: Result) -> bool:
    """Whether the texts of the result have a table of their own."""
    return len(result.get("texts") or ()) >= MANY and bool(result.get("over_texts"))


def text_section(result: Result) -> list[Block]:
    """The section of the page; empty for few texts, which are columns of the table of models."""
    if not has_table(result):
        return []
    rows: list[list[str | Cell]] = [list(row) for row in text_rows(result)]
    columns = ["text", *(model["name"] for model in result["models"])]
    note = f"Of each text: {NOTE}. The mean is geometric of perplexities, and plain of KL."
    return [Heading("Texts"), Table(columns, rows, strong=[len(rows) - 2, len(rows) - 1]), Paragraph(note)]


def text_rows(result: Result) -> list[list[Cell]]:
    """A row for each text, their mean, and the worst: the name, then a cell for each model, the donor first."""
    rows = []
    for text in result["texts"]:
        size = f"{count(text['sequences'])} × {count(text['sequence_length'])} tokens"
        donor, *others = text["models"]
        cells = [Cell(number(donor["perplexity"])), *map(_cell, others)]
        rows.append([Cell(text["text"], size), *cells])
    _, *others = result["over_texts"]
    mean = [Cell(_times(each["ratio"]), f"KL {number(each['kl'])}") for each in others]
    worst = [Cell(_times(each["worst_ratio"]), each["worst"]) for each in others]
    of = "of the suite's texts" if len(counted(result["texts"])) < len(rows) else ""
    return [*rows, [Cell("mean", of), Cell(""), *mean], [Cell("worst", of), Cell(""), *worst]]


def _cell(found: Mapping[str, Any]) -> Cell:
    """× 1.135 ± 0.012, with KL and top-1 agreement beside it."""
    ratio, kl = found.get("ratio"), number(found["kl"])
    if found.get("kl_stderr") is not None:
        kl += f" ± {found['kl_stderr']:.2g}"
    stderr = found.get("ratio_stderr")
    spread = f" ± {stderr:.2g}" if ratio is not None and stderr is not None else ""
    return Cell(_times(ratio) + spread, f"KL {kl}, top-1 {share(found['top1_agreement'])}")


def _times(ratio: float | None) -> str:
    return "not finite" if ratio is None else f"× {ratio:.3f}"
