"""The scores of the heads as a page of heat maps, layers × heads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..page.blocks import Block, Cell, Heading, Paragraph, Table
from ..report.units import number

MEANINGS = {
    "importance": "KL of all predictions on calibration text when the head is left out, nats a token; estimated.",
    "safety": "KL of the next token after requests to be refused when the head is left out (Ships); estimated.",
    "retrieval": "How often the head looks most at the token of a hidden number that is to be copied next.",
    "needle_attention": "Its attention to that token.",
    "previous_token": "Attention to the token before.",
    "duplicate_token": "In a repeated random text, attention to the same token's first occurrence.",
    "induction": "In a repeated random text, attention to the token behind that, which comes next.",
    "successor": "For how many numbers, days, months and letters the head, looking at one, most raises the next.",
}


def blocks(reference: str, found: Mapping[str, Any]) -> list[Block]:
    """A heat map for each score, a row a layer, and the heads that were left out in fact."""
    page: list[Block] = [Heading(f"Heads of {reference}", 1)]
    for name, meaning in MEANINGS.items():
        if name not in found["scores"]:
            continue
        page += [Heading(title(name)), Paragraph(meaning), _map(found["scores"][name])]
        if name in found["measured"]:
            page.append(_left_out("left out", found["measured"][name]))
        if name == "safety":
            page.append(_left_out("left out with those above (Sahara)", found["set"]))
    return page


def title(name: str) -> str:
    """A score's name for people."""
    return name.replace("_", " ")


def _map(scores: Sequence[Sequence[float]]) -> Table:
    most = max(map(max, scores)) or 1.0
    rows: list[list[str | Cell]] = [
        [str(layer), *(Cell(number(score), kind=f"heat heat-{round(10 * score / most)}") for score in row)]
        for layer, row in enumerate(scores)
    ]
    return Table(
        ["layer", *map(str, range(len(scores[0])))],
        rows,
        groups=[("", 1), ("head", len(scores[0]))],
        kind="heat",
    )


def _left_out(column: str, heads: Sequence[Mapping[str, Any]]) -> Table:
    rows = [[f"layer {each['layer']}, head {each['head']}", number(each["kl"])] for each in heads]
    return Table([column, "KL"], rows)
