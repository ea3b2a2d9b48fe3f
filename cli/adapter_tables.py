"""What the commands about adapters print."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any


def show_plan(report: dict[str, Any], console: Any) -> None:
    """Print what a new adapter would be."""
    show_new(report | {"output": f"{report['output']} (nothing was written)"}, console)


def show_new(report: dict[str, Any], console: Any) -> None:
    """Print a new adapter: what it is on, and how much of it there is to train."""
    from ..eval.report.units import count, share, size

    chosen, parameters = report["settings"], report["parameters"]
    trainable = (
        f"{count(parameters['trainable'])}, {share(parameters['share'])} of {count(parameters['base'])}"
    )
    rows = [("ranks", f"r_par {chosen['r_par']}, r_seq {chosen['r_seq']}, scale {chosen['scale']:g}")]
    rows += [("trainable parameters", trainable), ("size", size(report["output_bytes"]))]
    _table(f"{report['donor']} → {report['output']} (Hydra, untrained)", rows, report["modules"], console)


def show_merged(report: dict[str, Any], console: Any) -> None:
    """Print what was merged into what."""
    from ..eval.report.units import size

    rows = [("adapter", report["method"]), ("dtype", report["dtype"]), ("size", size(report["output_bytes"]))]
    rows += [("taken over whole", ", ".join(report["replaced"]))] if report["replaced"] else []
    _table(f"{report['base']} + {report['adapter']} → {report['output']}", rows, report["modules"], console)


def show_exported(report: dict[str, Any], console: Any) -> None:
    """Print the LoRA that an adapter became."""
    from ..eval.report.units import size

    ranks = Counter(report["rank_pattern"].values())
    others = "".join(f", {rank} in {n} modules" for rank, n in sorted(ranks.items()))
    biases = "lora_bias" if report["lora_bias"] else f"in the base layers ({report['bias']})"
    rows = [("rank", f"{report['rank']}{others}"), ("size", size(report["output_bytes"]))]
    rows += [("biases", biases)] if report["lora_bias"] or report["bias"] != "none" else []
    _table(f"{report['adapter']} → {report['output']} (LoRA)", rows, report["modules"], console)


def _table(title: str, rows: list[tuple[str, str]], modules: list[str], console: Any) -> None:
    from rich.table import Table

    console.out(title, highlight=False)
    table = Table(show_header=False)
    table.add_column("")
    table.add_column("", justify="right")
    for row in rows:
        table.add_row(*row)
    table.add_section()
    for pattern, number in Counter(re.sub(r"\.\d+\.", ".*.", name) for name in modules).items():
        table.add_row(pattern, f"{number} modules")
    console.print(table)
