"""`mhconvert inspect`: the attention of a donor or converted checkpoint, and what could be done about it."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer

from ..options import common
from ..options.ignored import refuse_ignored
from ..output import Flags, calm_transformers, execute
from ..progress import progress

Heads = Annotated[
    bool,
    typer.Option(
        "--heads",
        help="Score every head: what predictions lose without it, what it copies, what it refuses. Reads all weights.",
    ),
]
Prompts = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE", help="With --heads, requests to be refused, one a line, instead of our own."
    ),
]
Text = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE", help="With --heads, text to predict, instead of text sampled from the donor."
    ),
]
Output = Annotated[
    list[Path] | None,
    typer.Option(
        "--output",
        "-o",
        metavar="FILE",
        help="With --heads, write its maps of layers × heads as a page, .html or .md; repeatable.",
    ),
]
OF_HEADS = ("prompts", "text", "output", "device")
TOP = 10  # heads of each score that are printed
TOGETHER = 4  # scores side by side, so that a table fits into 80 columns


def command(
    model: common.Model,
    heads: Heads = False,
    prompts: Prompts = None,
    text: Text = None,
    output: Output = None,
    device: common.Device = None,
    trust_remote_code: common.Trust = False,
    json: common.Json = False,
    quiet: common.Quiet = False,
    debug: common.Debug = False,
) -> None:
    """Show attention geometry, KV cache sizes and the methods that apply; with --heads what each head carries."""
    files = output or []
    if not heads:
        given = {"prompts": prompts, "text": text, "output": files, "device": device}
        refuse_ignored(given, OF_HEADS, "is of --heads: give that too, or leave it out")

    def work(_: TextIO) -> dict[str, Any]:
        from mhconvert import api

        calm_transformers()
        if files:
            from ...eval.heads import picture
            from ...eval.page import page

        for path in files:
            page.check(path)
        with progress(quiet) as listener:
            result = api.inspect(
                model,
                heads=heads,
                prompts=prompts,
                text=text,
                device=device,
                trust_remote_code=trust_remote_code,
                on_progress=listener,
            )
        for path in files:
            page.write_blocks(path, f"Heads of {model}", picture.blocks(model, result["heads"]))
        return result

    execute(Flags(json, quiet, debug), work, show)


def show(facts: dict[str, Any], console: Any) -> None:
    """Print an inspection."""
    from rich.table import Table

    from ...eval.report.units import count, size

    console.out(f"{facts['reference']} ({facts['model_type']}, {facts['dtype']})", highlight=False)
    if len(facts["chain"]) > 1:
        console.out(
            f"made from {facts['first_donor']} by {' and then '.join(facts['chain'])}", highlight=False
        )
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
    if "heads" in facts:
        _show_heads(facts["heads"], console)


def _show_heads(found: Mapping[str, Any], console: Any) -> None:
    """The heads of highest score, a column a score; for those left out in fact what was measured."""
    from rich.table import Table

    from ...eval.heads.picture import title
    from ...eval.heads.survey import highest
    from ...eval.report.units import number

    columns: dict[str, list[str]] = {}
    for name, scores in found["scores"].items():
        measured = [(each["layer"], each["head"], each["kl"]) for each in found["measured"].get(name, ())]
        top = measured or [(i, h, scores[i][h]) for i, h in highest(scores, TOP)]
        columns[title(name)] = [f"{layer}.{head}  {number(score)}" for layer, head, score in top[:TOP]]
    console.out("the heads of highest score, as layer.head", highlight=False)
    for names in (list(columns)[:TOGETHER], list(columns)[TOGETHER:]):
        table = Table(*names)
        for row in itertools.zip_longest(*(columns[name] for name in names), fillvalue=""):
            table.add_row(*row)
        console.print(table)
    named = ", ".join(f"{each['layer']}.{each['head']} ({number(each['kl'])})" for each in found["set"])
    console.out(f"left out together, with the KL so far (Sahara): {named}", highlight=False)


def _short(value: Any) -> str:
    if isinstance(value, list):
        numbers = [each for each in value if not isinstance(each, str)]  # "full" is a window too
        span = [" to ".join(map(str, sorted({min(numbers), max(numbers)})))] if numbers else []
        return " or ".join([*span, *sorted(set(value) - set(numbers))]) + ", by layer"
    return f"{value:,.10g}" if isinstance(value, float) else str(value)
