"""`mhconvert eval`: how near a converted checkpoint stays to its donor on a text."""

from __future__ import annotations

from typing import Any, TextIO

from mhconvert.cli import options as o
from mhconvert.cli.output import Flags, calm_transformers, execute
from mhconvert.cli.progress import progress


def command(
    checkpoint: o.Checkpoint,
    text: o.Text,
    against: o.Against = None,
    sequence_length: o.SequenceLength = 1024,
    sequences: o.Sequences = 16,
    device: o.Device = None,
    trust_remote_code: o.Trust = False,
    json: o.Json = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:
    """Measure perplexity, KL divergence and top-1 agreement with the donor."""

    def work(_: TextIO) -> dict[str, Any]:
        from mhconvert import api

        calm_transformers()
        with progress(quiet) as listener:
            return api.evaluate(
                checkpoint,
                text=text,
                against=against,
                sequence_length=sequence_length,
                sequences=sequences,
                device=device,
                trust_remote_code=trust_remote_code,
                on_progress=listener,
            )

    execute(Flags(json, quiet, debug), work, show)


def show(result: dict[str, Any], console: Any) -> None:
    """Print an evaluation."""
    from rich.table import Column, Table

    from mhconvert.eval.report import rows

    title = f"{result['text']}: {result['sequences']} × {result['sequence_length']} tokens"
    console.out(title, highlight=False)
    console.out(f"{result['against']} → {result['checkpoint']}", highlight=False)
    table = Table("", Column("donor", justify="right"), Column("converted", justify="right"), "")
    for row in rows({key: value for key, value in result.items() if key != "seconds"}):
        table.add_row(*row)
    console.print(table)
