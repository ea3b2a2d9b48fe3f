"""Plots of a KV-budget curve and of a healing run. They need matplotlib, from the extra mhconvert[plot]."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mhconvert import extras
from mhconvert.errors import OutputError

from .conversion_tables import json_safe

PICTURES = (".svg", ".png", ".pdf")
BLUE, ORANGE, GREY = "#1f5fa8", "#b8541a", "#6b6b6b"
BYTE_TICKS = (0.03125, 0.0625, 0.09375, 0.125, 0.1875, 0.25, 0.3125, 0.5, 0.75, 1)


def check(files: Sequence[Path], force: bool) -> None:
    """Check that `write` can write the files, before the curve is measured.

    Raises:
        OutputError: a file exists and `force` is not set, its ending is unknown, or it cannot be written there.
        MhconvertError: a picture is asked for and matplotlib is not installed.
    """
    for file in files:
        if file.suffix not in (*PICTURES, ".json"):
            known = ", ".join((*PICTURES, ".json"))
            raise OutputError(f"{file} ends in none of {known}; the ending decides what is written")
        if file.is_dir():
            raise OutputError(f"{file} cannot be written: it is a folder")
        if file.exists() and not force:
            raise OutputError(f"{file} exists; choose another file with -o, or replace it with --force")
        if not file.absolute().parent.is_dir():
            raise OutputError(f"{file} cannot be written: there is no folder {file.absolute().parent}")
        if file.suffix in PICTURES:
            extras.require("matplotlib", str(file), "a .json file and the table do without")


def write(result: dict[str, Any], file: Path) -> None:
    """Write `result` of `mhconvert.curve` as a plot or as JSON; the file's ending decides.

    Raises:
        OutputError: the file cannot be written.
    """
    try:
        if file.suffix == ".json":
            file.write_text(
                json.dumps(json_safe(result), indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
            )
        else:
            _save(draw(result), file)
    except OSError as error:
        raise OutputError(f"{file} cannot be written: {error.strerror}") from error


def _save(figure: Any, file: Path) -> None:
    import matplotlib

    with matplotlib.rc_context({"svg.fonttype": "none"}):  # SVG text as text, not as outlines
        figure.savefig(file, dpi=160)


def draw(result: dict[str, Any]) -> Any:
    """A matplotlib figure of two panels: perplexity ratio to the donor, and KL, against the cache's bytes.

    One line is the conversion, the other the donor with quantised caches, where these were measured. All axes are
    logarithmic. Points that are not finite are left out.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    lines = {result["method"].upper(): result["points"], "donor, quantised cache": result.get("baselines")}
    lines = {name: sorted(line, key=lambda point: point["kv_share"]) for name, line in lines.items() if line}
    _panel(left, lines, "perplexity_ratio", "{:.2f} ×", (1, 1.2, 1.5, 2, 3, 5, 7))
    left.set_title(f"Perplexity, times the donor's {result['perplexity']:.4g}", loc="left", fontsize=10)
    left.axhline(1, color=GREY, linewidth=0.8, linestyle=(0, (4, 3)), zorder=0)
    _panel(right, lines, "kl", "{:.2g}", (1, 2, 5))
    right.set_title("KL from the donor, nats a token", loc="left", fontsize=10)
    steps = result["fit_steps"]
    fit = f"{steps} fit steps a layer" if steps else "closed form"
    name = result.get("donor_name") or result["donor"]
    figure.suptitle(
        f"{name} → {result['method'].upper()}, {fit}", x=0.01, ha="left", fontsize=12, fontweight="bold"
    )
    calibrated = f"calibrated on {result['calibration']['tokens']:,} tokens"
    figure.supxlabel(
        f"{calibrated}; measured on {result['measured_tokens']:,} predictions, {result['measured_on']}",
        x=0.01,
        ha="left",
        fontsize=8,
        color=GREY,
    )
    return figure


HEALING = "healing.svg"


def write_healing(folder: Path) -> str | None:
    """Plot `metrics.jsonl` of a healed checkpoint into its folder.

    Returns the plot's file name, or None if matplotlib is not installed.
    """
    if not extras.is_installed("matplotlib"):
        return None
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    _save(draw_healing([json.loads(line) for line in lines]), folder / HEALING)
    return HEALING


def draw_healing(entries: Sequence[dict[str, Any]]) -> Any:
    """A matplotlib figure: training loss and KL on held-out rows, in nats a token, against trained tokens."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    steps = [entry for entry in entries if "loss" in entry]
    tokens = {entry["step"]: entry["tokens"] for entry in steps} | {0: 0}
    held_out = [(tokens[e["step"]], e["held_out_kl"]) for e in entries if "held_out_kl" in e]
    axes.plot(
        [e["tokens"] for e in steps], [e["loss"] for e in steps], color=GREY, linewidth=0.9, label="loss"
    )
    axes.plot(
        *zip(*held_out, strict=True), color=BLUE, linewidth=1.6, marker="o", label="KL on held-out rows"
    )
    axes.set(yscale="log", xlabel="tokens", ylabel="nats a token")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return figure


def _panel(
    axes: Any, lines: dict[str, list[dict[str, Any]]], key: str, label: str, ticks: tuple[float, ...]
) -> None:
    """Plot `key` of each line's points against their share of the bytes, each point labelled with its value."""
    from matplotlib.ticker import LogLocator, NullLocator

    axes.set(xscale="log", yscale="log")
    shares: set[float] = set()
    for (name, points), colour, marker, below in zip(
        lines.items(), (BLUE, ORANGE), "os", (5, -11), strict=False
    ):
        values = [(p["kv_share"], p[key]) for p in points if math.isfinite(p[key]) and p[key] > 0]
        style = {"color": colour, "linewidth": 1.6, "marker": marker, "markersize": 5, "clip_on": False}
        axes.plot([x for x, _ in values], [y for _, y in values], label=name, **style)
        for point in values:
            text = label.format(point[1])
            axes.annotate(text, point, (5, below), textcoords="offset points", fontsize=8, color=colour)
        shares |= {x for x, _ in values}
    if len(lines) > 1:
        axes.legend(frameon=False, fontsize=8)
        shares = {tick for tick in BYTE_TICKS if min(shares) <= 1.05 * tick and tick <= 1.05 * max(shares)}
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(sorted(shares), [f"{100 * tick:.4g}" for tick in sorted(shares)], fontsize=8)
    axes.set_xlabel("KV cache, % of the bytes at 16 bits an element", fontsize=9)
    axes.margins(x=0.1, y=0.15)
    axes.yaxis.set_major_locator(LogLocator(subs=ticks))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.tick_params(axis="y", labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e4e4e4", linewidth=0.8)
    axes.set_axisbelow(True)
