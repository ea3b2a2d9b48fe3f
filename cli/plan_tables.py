"""What `--dry-run` prints: the plan of a conversion, of each step of a chain, and of the whole."""

from __future__ import annotations

from typing import Any

from ..convert.methods.registry import METHODS
from . import adapter_tables

CODED = 0.75  # codes are counted as elements of 16 bits, and are of float32 about half that share


def active_heads(plan: dict[str, Any]) -> list[tuple[str, str]]:
    """The row of a plan that says how many heads a token has; none for methods that keep all."""
    heads = plan.get("active_heads")
    return [("active heads a token", f"{heads['converted']} of {heads['donor']}")] if heads else []


def length_rows(plan: dict[str, Any]) -> list[tuple[str, str]]:
    """The rows of a plan with windows or states: at which length the cache is counted, and what it is at others."""
    from ..eval.report.length_rows import by_length

    cache, lengths = plan["kv_bytes_per_token"], plan.get("windows") or plan.get("states")
    if not lengths:
        return []
    from ..eval.report.units import size

    context = lengths["context"]
    return [
        (
            f"KV cache of {context:,} tokens",
            f"{size(cache['donor'] * context)} → {size(cache['converted'] * context)}",
        ),
        *by_length(plan),
    ]


def donor_share(plan: dict[str, Any]) -> str:
    """The share of the donor's cache; of codes beside float32 also that of 16 bits, which their budget is of."""
    from ..eval.report.units import share

    part, counted = (
        plan[name]["converted"] / plan[name]["donor"]
        for name in ("kv_bytes_per_token", "kv_elements_per_token")
    )
    coded = plan["dtype"] == "float32" and part < CODED * counted
    return f"{share(part)} of float32, {share(counted)} of 16 bits" if coded else share(part)


def expected_time(plan: dict[str, Any]) -> list[tuple[str, str]]:
    """The row of the time, where the plan has one."""
    from ..eval.report.units import duration

    seconds = plan.get("expected_seconds")
    return [("time expected, on this machine while idle", duration(sum(seconds.values())))] if seconds else []


def show(plan: dict[str, Any], console: Any) -> None:
    """Print what a conversion would do and need; of a chain each step first, in the folder that is gone in the end."""
    steps = plan.get("steps", ())
    for step in steps if len(steps) > 1 else ():
        _show_one(step, console)
    _show_one(plan, console)
    if "adapter" in plan:
        adapter_tables.show_plan(plan["adapter"], console)


def _show_one(plan: dict[str, Any], console: Any) -> None:
    from rich.table import Table

    from ..eval.report.units import size

    cache, asked = plan["kv_bytes_per_token"], plan.get("tolerance")
    console.out(f"{plan['donor']} → {plan['output']} (nothing was written)", highlight=False)
    table = Table(show_header=False)
    table.add_column("")
    table.add_column("", justify="right")
    for name, value in (
        ("method", plan["method"]),
        (
            "KV cache a token",
            f"{size(cache['donor'])} → {'at most ' if asked else ''}{size(cache['converted'])}",
        ),
        (
            "share of the donor's",
            f"the smallest within {asked}; it will be searched" if asked else donor_share(plan),
        ),
        *active_heads(plan),
        *length_rows(plan),
        ("size of the result", size(plan.get("output_bytes"))),
        ("disk needed", size(plan.get("disk_needed_bytes"))),
        ("memory needed", size(plan.get("memory_needed_bytes"))),
        *expected_time(plan),
    ):
        table.add_row(name, value)
    one = METHODS.get(plan["method"])  # the whole of a chain has no sizes of its own
    for label, key in one.sizes if one is not None else ():
        widths = [layer[key] for layer in plan.get("layers", []) if key in layer]
        if widths:
            low, high = min(widths), max(widths)
            table.add_row(label, str(low) if low == high else f"{low} to {high}, by layer")
    console.print(table)
    _show_layers(plan, console)
    for notice in (plan.get("notice"), plan.get("cache_estimate"), plan.get("calibration", {}).get("notice")):
        if notice:
            console.out(notice, highlight=False)


def _show_layers(plan: dict[str, Any], console: Any) -> None:
    """Print a surveyed plan's layers, where they are of several kinds: each one's kind, cache and prices."""
    from rich.table import Column, Table

    from ..eval.report.layer_kinds import kind_rows, kinds_known, picture, price_notes

    if not kinds_known(plan):
        return
    console.out(picture(plan["layers"]), highlight=False)
    if not (notes := price_notes(plan)):
        return
    titles, *rows = kind_rows(plan["layers"])
    table = Table(*(Column(title, justify="right") for title in titles))
    for row in rows:
        table.add_row(*row)
    console.print(table)
    for note in notes:
        console.print(note, highlight=False, markup=False)
