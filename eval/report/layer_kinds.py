"""The layers of a plan or a report that are of several kinds: a line of signs, and a table of what each kind costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...convert.methods.layer_kinds import CODES, FULL, LINEAR, WINDOWED
from .units import number, share

Layers = Sequence[Mapping[str, Any]]

SIGNS = {FULL: "█", WINDOWED: "▄", LINEAR: "▁"}
PRICES = (WINDOWED, LINEAR, CODES)
MEANING = (
    "Prices are the KL of the predictions, nats a token, when that layer alone is changed, as a survey estimates it. A "
    "full layer without codes is the donor's."
)


def kinds_known(content: Mapping[str, Any]) -> bool:
    """Whether the layers of a plan or report are of several kinds that are known."""
    layers = content.get("layers") or ()
    return bool(layers) and all("kind" in layer for layer in layers)


def picture(layers: Layers) -> str:
    """A sign for each layer, and what the signs mean: "█▄▄█ (█ full, ▄ windowed)"."""
    found = {layer["kind"] for layer in layers}
    legend = ", ".join(f"{sign} {kind}" for kind, sign in SIGNS.items() if kind in found)
    return f"{''.join(SIGNS[layer['kind']] for layer in layers)} ({legend})"


def priced_kinds(layers: Layers) -> list[str]:
    """Those of PRICES that some layer has."""
    return [kind for kind in PRICES if any(kind in layer.get("costs", {}) for layer in layers)]


def kind_rows(layers: Layers) -> list[list[str]]:
    """A header, then a row for each layer: its kind, window, share of the donor's cache, and prices.

    A column that is empty in all rows is left out.
    """
    prices = priced_kinds(layers)
    titles = ["layer", "kind", "window", "KV cache", *(f"price, {kind}" for kind in prices)]
    rows = [
        [
            str(index),
            layer["kind"],
            f"{layer['window']:,}" if layer.get("window") else "",
            share(layer["kv_share"]),
            *(number(layer.get("costs", {}).get(kind)) for kind in prices),
        ]
        for index, layer in enumerate(layers)
    ]
    used = [at for at in range(len(titles)) if any(row[at] for row in rows)]
    return [[row[at] for at in used] for row in (titles, *rows)]


def price_notes(content: Mapping[str, Any]) -> list[str]:
    """Sentences on what the prices of a plan or report are of; none where it has no prices."""
    prices = priced_kinds(content["layers"])
    if not prices:
        return []
    notes = [MEANING, *(_measured_as(*item) for item in content.get("priced", {}).items())]
    return (
        [*notes, "Codes: what those that the layer gets are expected to add."] if CODES in prices else notes
    )


def _measured_as(kind: str, facts: Mapping[str, Any]) -> str:
    if "reason" in facts:
        return f"{kind.capitalize()} was not measured: {facts['reason']}."
    if kind == LINEAR:
        return f"Linear: a {facts['mixer']} mixer started from the attention, before its fit."
    return f"Windowed: {facts['window']:,} tokens, sinks {facts['sinks']}."
