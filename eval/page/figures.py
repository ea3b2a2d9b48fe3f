"""The sections with plots, each with its numbers in a table: the KV-budget curve and the errors by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any

from mhconvert import extras

from ..report.units import number, share
from . import plots
from .blocks import Block, Figure, Heading, Paragraph, Table
from .verdict import cache_shares, cache_tokens, conversions, ratio

AS_MADE = ("converted", "donor")  # and not trained since
NO_PLOT = f"There is no plot because matplotlib is missing: {extras.install('matplotlib')}"


def curves(result: Mapping[str, Any]) -> list[Block]:
    """For each text, perplexity against the KV budget; empty unless two converted models differ in cache size."""
    shares = cache_shares(result)
    if len({kept for kept in shares[1:] if kept is not None}) < 2 or not result.get("texts"):
        return []
    page: list[Block] = [Heading("What the cache buys")]
    for text in result["texts"]:
        base = text["models"][0].get("perplexity")
        points = [
            plots.Point(model["name"], str(model["method"] or "donor"), kept, times, model["role"] in AS_MADE)
            for model, kept, measured in list(zip(result["models"], shares, text["models"], strict=True))[1:]
            if kept is not None and (times := ratio(measured.get("perplexity"), base)) is not None
        ]
        if plots.available():
            caption = f"{text['text']}. Filled: as made; open: healed or adapted."
            tokens = cache_tokens(result)
            caption += f" Caches hold {tokens:,} tokens." if tokens else ""
            page.append(Figure(plots.budget(points, text["text"]), caption))
        ordered = sorted(points, key=lambda point: -point.kept)
        rows = [[point.name, share(point.kept), f"× {point.ratio:.3f}"] for point in ordered]
        page.append(figure_table(Table(["model", "KV cache", f"perplexity on {text['text']}"], rows)))
    return page if plots.available() else [*page, Paragraph(NO_PLOT)]


def layers(result: Mapping[str, Any], reports: Sequence[Mapping[str, Any]]) -> list[Block]:
    """The relative error of each layer's attention after conversion.

    Models with equal errors share one series, as a healed model has the errors of its conversion.
    """
    names_by_errors: dict[tuple[float | None, ...], list[str]] = {}
    for model, report in zip(conversions(result), reports, strict=False):
        errors = tuple(layer.get("relative_error") for layer in (report or {}).get("layers") or ())
        if errors:
            names_by_errors.setdefault(errors, []).append(model["name"])
    series = [(", ".join(names), errors) for errors, names in names_by_errors.items()]
    if not series:
        return []
    page: list[Block] = [Heading("Error by layer")]
    exact = [name for name, errors in series if not any(errors)]
    note = "Of the attention's output, against the donor's on the same input, as converted and before any healing."
    page.append(Paragraph(note + (f" Without error: {', '.join(exact)}." if exact else "")))
    if len(exact) == len(series):
        return page
    if plots.available():
        page.append(
            Figure(
                plots.layers(series, "relative error", "Relative error of each layer"),
                "Relative error of each layer, on a logarithmic scale.",
            )
        )
    else:
        page.append(Paragraph(NO_PLOT))
    rows = [
        [str(index), *map(number, errors)]
        for index, errors in enumerate(zip_longest(*(e for _, e in series)))
    ]
    return [*page, figure_table(Table(["layer", *(name for name, _ in series)], rows))]


def figure_table(table: Table) -> Table:
    """The table of a figure's numbers, collapsed if the figure is drawn."""
    folded = "The numbers" if plots.available() else ""
    return Table(table.columns, table.rows, folded=folded)
