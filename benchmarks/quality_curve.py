"""The quality curve: perplexity and KL against the bytes of the KV cache, from the data of benchmarks/."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = dict[str, Any]
Figures = dict[str, dict[str, Any]]
Point = tuple[float, float, float | None]  # share of the KV cache in percent, perplexity over the donor's, KL


@dataclass(frozen=True)
class Series:
    """Points that are drawn alike and joined."""

    label: str
    colour: str
    style: str
    points: list[Point]


def series(figures: Figures) -> list[Series]:
    """What the quality curve shows."""

    def chosen(name: str, wanted: Callable[[Row], bool]) -> list[Point]:
        donor = figures[name]["donor"]["perplexity"]
        rows = sorted(filter(wanted, figures[name]["rows"]), key=lambda row: row["kv_share"])
        return [
            (
                float(row["kv_share"]),
                float(row["perplexity"] / donor),
                float(row["kl"]) if "kl" in row else None,
            )
            for row in rows
        ]

    def mla(effort: str) -> list[Point]:
        return chosen("mla", lambda row: row["effort"] == effort and row.get("profile") != "portable")

    def coded(begin: str, end: str) -> list[Point]:
        return chosen("coded", lambda row: row["model"].startswith(begin) and row["model"].endswith(end))

    return [
        Series("MLA, coded latents", "#c0262d", "o-", coded("coded", "latents")),
        Series(
            "MLA, coded latents, healed on 200k tokens",
            "#c0262d",
            "D",
            coded("coded", "healed on 200k tokens"),
        ),
        Series("donor, quantised cache", "#444444", "x--", coded("donor", "")),
        Series("MLA, 16 bits", "#2f7ed8", "o-", mla("default")),
        Series(
            "MLA, 16 bits, healed on 200k tokens",
            "#2e9e5b",
            "D",
            chosen("healing", lambda row: "then end to end" in row["stage"]),
        ),
        Series("DHA, default effort", "#d9762b", "s-", chosen("dha", lambda row: True)),
        Series(
            "MoH, 75 % of the heads", "#a33ea1", "^", chosen("methods", lambda row: row["method"] == "MoH")
        ),
    ]


def fingerprint(figures: Figures) -> str:
    """Hash of all that the plot is drawn from; it stands in the SVG's description."""
    drawn = [[one.label, one.colour, one.style, one.points] for one in series(figures)]
    return "data sha256:" + hashlib.sha256(json.dumps(drawn).encode()).hexdigest()[:32]


def draw(figures: Figures, file: Path) -> None:
    """Writes the quality curve. The same data and matplotlib give the same bytes."""
    import matplotlib
    from matplotlib.figure import Figure

    style: Any = {
        "svg.hashsalt": "mhconvert",
        "svg.fonttype": "none",
        "font.family": "sans-serif",
        "font.size": 9,
    }
    with matplotlib.rc_context(style):
        picture = Figure(figsize=(9, 4.6), layout="constrained", facecolor="white")
        left, right = picture.subplots(1, 2)
        panels = (
            (left, 1, "Perplexity, times the donor's", (1, 1.2, 1.5, 2, 3, 5, 10)),
            (right, 2, "KL divergence from the donor, nats a token", (1e-4, 0.001, 0.01, 0.1, 1)),
        )
        for axes, index, title, ticks in panels:
            for one in series(figures):
                points = [(point[0], point[index]) for point in one.points if point[index] is not None]
                if points:
                    axes.plot(*zip(*points, strict=True), one.style, color=one.colour, label=one.label, ms=5)
            axes.set_title(title, loc="left", fontsize=10)
            axes.set_xlabel("bytes of the KV cache, as a share of 16 bits an element")
            axes.set_xscale("log")
            axes.set_yscale("log")
            shares = (6.25, 12.5, 25, 50, 100)
            axes.set_xticks(shares, labels=[f"{share:g} %" for share in shares])
            axes.set_yticks(ticks, labels=[f"{tick:g}" for tick in ticks])
            axes.minorticks_off()
            axes.grid(color="#dddddd", linewidth=0.6)
            axes.spines[["top", "right"]].set_visible(False)
        handles, labels = left.get_legend_handles_labels()
        picture.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
        file.parent.mkdir(parents=True, exist_ok=True)
        metadata = {"Date": None, "Creator": None, "Description": fingerprint(figures)}
        picture.savefig(file, metadata=metadata)
    lines = file.read_text(encoding="utf-8").splitlines()
    file.write_text("\n".join(line.rstrip() for line in lines) + "\n", encoding="utf-8")
