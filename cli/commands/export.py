"""`mhconvert export CKPT --to FORM`: the same function in a form that others load; and `mhconvert verify`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, TextIO

import typer

from ...convert.methods.registry import METHOD_NAMES, forms, info
from .. import adapter_tables
from ..options import common
from ..output import Flags, calm_transformers, execute, shown
from ..progress import progress

Exported = Annotated[
    str,
    typer.Argument(metavar="CKPT", help="A folder that mhconvert wrote, or the folder of a saved adapter."),
]
WRITTEN = "; ".join(
    f"{', '.join(form.name for form in method.forms)}: of {method.label}"
    for method in map(info, METHOD_NAMES)
    if method.forms
)
To = Annotated[
    str,
    typer.Option(
        "--to",
        callback=common.one_of(("auto", *forms()), "a form"),
        help=f"{WRITTEN}; auto: the first of these that is exact, and why.",
        metavar="FORM",
    ),
]
Output = Annotated[
    Path | None,
    typer.Option("--output", "-o", metavar="OUT", help="Folder (gguf: file) to write; ./CKPT-FORM."),
]
Dtype = Annotated[
    Literal["float32", "bfloat16"] | None, typer.Option(help="Of an mla export's weights; their own.")
]
Kind = Annotated[Literal["f32", "f16", "bf16", "q8_0"], typer.Option(help="gguf: of its weights.")]
PadRow = Annotated[
    Literal["320", "512", "576"] | None,
    typer.Option(
        "--pad-row",
        help="mla: widen the latent with zeros until a row has so many elements, for vLLM; it says what it costs.",
    ),
]
For = Annotated[
    Literal["vllm", "sglang", "llama.cpp", "transformers"] | None,
    typer.Option("--for", help="Refuse what this engine does not take; auto: take a form that it does."),
]
Duplicate = Annotated[
    bool,
    typer.Option(
        "--duplicate",
        help="dha: heads may be cached twice where that makes groups equal; it says what it costs.",
    ),
]
NoProof = Annotated[bool, typer.Option("--no-verify", help="Skip the reload in a bare process.")]
Preflight = Annotated[bool, typer.Option("--dry-run", help="Say which engines load it; write nothing.")]
Python = Annotated[
    str | None,
    typer.Option(
        metavar="PYTHON", help="Interpreter of another environment, whose transformers loads the folder."
    ),
]
Folder = Annotated[
    str, typer.Argument(metavar="FOLDER", help="An export, a converted checkpoint, or any model folder.")
]
Tolerance = Annotated[
    float | None,
    typer.Option(
        metavar="SD", help="Largest logit difference allowed, in standard deviations of the logits."
    ),
]


def command(
    checkpoint: Exported,
    to: To,
    output: Output = None,
    base: common.Base = None,
    dtype: Dtype = None,
    kind: Kind = "bf16",
    pad_row: PadRow = None,
    engine: For = None,
    duplicate: Duplicate = False,
    no_verify: NoProof = False,
    dry_run: Preflight = False,
    force: common.Force = False,
    device: common.Device = None,
    trust_remote_code: common.Trust = False,
    json: common.Json = False,
    quiet: common.Quiet = False,
    debug: common.Debug = False,
) -> None:
    """Write CKPT in a form that stock engines load, and prove that it computes the same."""

    def work(_: TextIO) -> dict[str, Any]:
        from mhconvert import api

        calm_transformers()
        with progress(quiet) as listener:
            return api.export(
                checkpoint,
                to,
                common.written(output),
                base=base,
                dtype=dtype,
                kind=kind,
                pad_row=None if pad_row is None else int(pad_row),
                engine=engine,
                duplicate=duplicate,
                verify=not no_verify,
                force=force,
                dry_run=dry_run,
                device=device,
                trust_remote_code=trust_remote_code,
                on_progress=listener,
            )

    execute(Flags(json, quiet, debug), work, shown(quiet, show))


def show(report: dict[str, Any], console: Any) -> None:
    """Print what was made, why in that form, what the proof found, and which engines load it."""
    from rich.table import Table

    from ...eval.report.units import size

    if report["to"] == "lora":
        adapter_tables.show_exported(report, console)
        return
    console.out(
        f"{report['checkpoint']} → {report['output']} ({report.get('architecture', report['to'])})",
        highlight=False,
    )
    if report.get("why"):
        console.out(f"--to {report['to']}: {report['why']}", highlight=False)
    cache = report.get("kv_bytes_per_token")
    cache = cache["export"] if isinstance(cache, dict) else cache
    found = report.get("verified") or {}
    table = Table(show_header=False)
    table.add_column("")
    table.add_column("", justify="right")
    for name, value in (
        ("KV cache a token", size(cache) if cache else None),
        *padded(report),
        ("logits, relative error", f"{found['relative_logit_error']:.3g}" if found else None),
        ("greedy continuation", ("the same" if found["greedy_equal"] else "another") if found else None),
        ("size", size(report["output_bytes"]) if report.get("output_bytes") else None),
    ):
        if value is not None:
            table.add_row(name, value)
    console.print(table)
    if report.get("engines"):
        show_engines(report["engines"], console)


def padded(report: dict[str, Any]) -> list[tuple[str, str]]:
    """The row of a report that says what a wider latent costs; none where it is as it was."""
    from ...eval.report.units import size

    cost = report.get("padded_row")
    if not cost:
        return []
    row, held = cost["row"], {name: size(count) for name, count in cost["kv_bytes_per_token"].items()}
    return [
        (
            f"row {row['from']} → {row['to']}, by zeros",
            f"{held['from']} → {held['to']}; donor {held['donor']}",
        )
    ]


def show_engines(engines: list[list[Any]], console: Any) -> None:
    """Print which engines load an export with its small cache."""
    from rich.table import Table

    table = Table("engine", "small cache", "")
    for engine, served, how in engines:
        table.add_row(engine, "yes" if served else "no", how)
    console.print(table)


def verify(
    folder: Folder,
    against: common.Against = None,
    tolerance: Tolerance = None,
    python: Python = None,
    trust_remote_code: common.Trust = False,
    json: common.Json = False,
    quiet: common.Quiet = False,
    debug: common.Debug = False,
) -> None:
    """Load FOLDER in a bare process, without mhconvert, and compare its logits with what they should be."""

    def work(_: TextIO) -> dict[str, Any]:
        from mhconvert import api

        calm_transformers()
        with progress(quiet) as listener:
            return api.verify(
                folder,
                against=against,
                tolerance=tolerance,
                python=python,
                trust_remote_code=trust_remote_code,
                on_progress=listener,
            )

    execute(Flags(json, quiet, debug), work, show_verified)


def show_verified(found: dict[str, Any], console: Any) -> None:
    """Print how far a folder is from what it was compared with."""
    from rich.table import Table

    from ...eval.report.units import size

    console.out(f"{found['folder']} beside {found['against']}", highlight=False)
    table = Table(show_header=False)
    table.add_column("")
    table.add_column("", justify="right")
    for name, value in (
        ("class", f"{found['model_class']}, transformers {found['transformers']}"),
        ("largest logit difference", f"{found['relative_difference']:.3g} standard deviations"),
        ("logits, relative error", f"{found['relative_logit_error']:.3g}"),
        ("greedy continuation", "the same" if found["greedy_equal"] else "another"),
        ("KV cache a token", f"{size(found['cache']['bytes_per_token'])} in float32"),
    ):
        table.add_row(name, value)
    console.print(table)
