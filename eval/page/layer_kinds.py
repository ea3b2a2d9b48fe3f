"""Layers of several kinds drawn: a coloured cell for each layer, and the price of each kind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..report.layer_kinds import kind_rows, kinds_known, price_notes, priced_kinds
from ..report.units import share
from . import plots
from .blocks import Block, Cell, Figure, Heading, Paragraph, Table
from .figures import NO_PLOT, figure_table
from .verdict import conversions

IN_A_ROW = 10  # layers


def layer_kinds(result: Mapping[str, Any], reports: Sequence[Mapping[str, Any]]) -> list[Block]:
    """The section of an evaluation's page: each conversion with layers of several kinds; a healed one is as before."""
    drawn: dict[str, list[Block]] = {}
    for model, report in zip(conversions(result), reports, strict=False):
        if kinds_known(report or {}):
            before = [name for name, known in drawn.items() if known == pictures(report)]
            name = before[0] if before else model["name"]
            known = drawn.pop(name, None) or pictures(report)
            drawn[f"{name}, {model['name']}" if before else name] = known
    sections = [block for name, known in drawn.items() for block in (Heading(name, 3), *known)]
    return [Heading("Kinds of layers"), *sections] if sections else []


def survey_page(plan: Mapping[str, Any]) -> list[Block]:
    """The page of a surveyed plan: what every layer becomes, and what it costs as each kind."""
    lengths = plan.get("windows") or plan["states"]
    part = share(lengths["shares"][str(lengths["context"])])
    about = (
        f"What every layer of {plan['donor']} is worth, with {plan['method']} and {part} of the cache of "
        f"{lengths['context']:,} tokens"
    )
    return [Heading(about, 1), *pictures(plan)]


def pictures(content: Mapping[str, Any]) -> list[Block]:
    """The layers of a plan or a report as a map, and their prices as a plot with its numbers."""
    layers = content["layers"]
    page: list[Block] = [_map(layers)]
    if not (prices := priced_kinds(layers)):
        return page
    page += [Paragraph(" ".join(price_notes(content)))]
    if plots.available():
        series = [(kind, [layer.get("costs", {}).get(kind) for layer in layers]) for kind in prices]
        svg = plots.layers(series, "price, nats a token", "Price of each layer")
        page.append(Figure(svg, "What a layer costs as each kind, on a logarithmic scale."))
    else:
        page.append(Paragraph(NO_PLOT))
    titles, *rows = kind_rows(layers)
    return [*page, figure_table(Table(titles, rows))]


def _map(layers: Sequence[Mapping[str, Any]]) -> Table:
    """A cell for each layer: its kind as label and colour, and beside it its share of the donor's cache."""
    rows: list[list[str | Cell]] = []
    for start in range(0, len(layers), IN_A_ROW):
        part = layers[start : start + IN_A_ROW]
        cells = [
            Cell(layer["kind"], share(layer["kv_share"]), f"kind kind-{layer['kind']}") for layer in part
        ]
        rows.append([f"layers {start} to {start + len(part) - 1}", *cells])
    columns = ["", *(f"+ {index}" for index in range(min(IN_A_ROW, len(layers))))]
    return Table(columns, rows, "Each layer's kind, and its share of the donor's cache", kind="heat")
