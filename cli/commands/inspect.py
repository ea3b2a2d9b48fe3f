"""`mhconvert inspect`: the attention of a donor or converted checkpoint, and what could be done about it."""

from __future__ import annotations

from typing import Any, TextIO

from ..options import common
from ..output import Flags, calm_transformers, execute


def command(
    model: common.Model,
    trust_remote_code: common.Trust = False,
    json: common.Json = False,
    quiet: common.Quiet = False,
    debug: common.Debug = False,
) -> None:
    """Show attention geometry, KV cache sizes and the methods that apply. Reads no weights."""

    def work(_: TextIO) -> dict[str, Any]:
        from mhconvert import api

        calm_transformers()
        return api.inspect(model, trust_remote_code=trust_remote_code)

    execute(Flags(json, quiet, debug), work, show)


def show(facts: dict[str, Any], console: Any) -> None:
    """Print an inspection."""
    from rich.table import Table

    from ...eval.report.units import count, size

    console.out(f"{facts['reference']} ({facts['model_type']}, {facts['dtype']})", highlight=False)
    table = Table(show_header=False)
    table.add_column("")
    table.add_column("", justify="right")
    for name, value in facts["attention"].items():
        if value is not None:
            table.add_row(name, _short(value))
    table.add_section()
    if "kv_code_bytes" not in facts["attention"]:
        table.add_row("KV elements a token", count(facts["kv"]["elements_per_token"]))
    table.add_row("KV bytes a token", count(facts["kv"]["bytes_per_token"]))
    for length, held in facts["kv"]["bytes"].items():
        table.add_row(f"KV cache at {int(length):,} tokens", size(held))
    console.print(table)
    for name, method in facts["methods"].items():
        if method["applies"] and "trainable_parameters" in method:
            text = f"{name}: applies; {count(method['trainable_parameters'])} trainable parameters"
            console.print(f"{text}, output {size(method['output_bytes'])}", highlight=False)
        elif method["applies"]:
            cost = f"KV cache a token → {size(method['kv_bytes_per_token'])}"
            console.print(f"{name}: applies; {cost}, output {size(method['output_bytes'])}", highlight=False)
        else:
            console.print(f"{name}: {method['reason']}", highlight=False)
    if facts.get("notice"):
        console.print(facts["notice"], highlight=False)


def _short(value: Any) -> str:
    if isinstance(value, list):
        return f"{min(value)} to {max(value)}, by layer"
    return f"{value:,.10g}" if isinstance(value, float) else str(value)
