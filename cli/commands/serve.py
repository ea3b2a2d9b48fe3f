"""`mhconvert serve`: an engine's command for a checkpoint, run in place of this process or only printed."""

from __future__ import annotations

import os
import shlex
from typing import Annotated, Any, Literal, TextIO

import typer

from ..options import common
from ..output import Flags, execute
from ..progress import progress

Served = Annotated[
    str,
    typer.Argument(metavar="CKPT", help="A folder that mhconvert wrote, any model folder, or a .gguf file."),
]
Engine = Annotated[
    Literal["auto", "vllm", "llama-server", "transformers"],
    typer.Option(help="auto: vllm where it is installed and takes a form of CKPT, else transformers."),
]
Python = Annotated[
    str | None,
    typer.Option(metavar="PYTHON", help="Interpreter of the environment that has the engine; this one."),
]
Output = Annotated[
    str | None, typer.Option("--output", "-o", metavar="OUT", help="Where an export is written; ./CKPT-FORM.")
]
Host = Annotated[str, typer.Option(metavar="ADDRESS", help="Where it listens.")]
Port = Annotated[int, typer.Option(metavar="N", min=1, max=65535, help="Where it listens.")]
Dtype = Annotated[Literal["bfloat16", "float32"], typer.Option(help="Of weights and cache.")]
Print = Annotated[bool, typer.Option("--print", help="Print the command and do not run it.")]


def command(
    checkpoint: Served,
    engine: Engine = "auto",
    output: Output = None,
    python: Python = None,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    dtype: Dtype = "bfloat16",
    print_only: Print = False,
    trust_remote_code: common.Trust = False,
    json: common.Json = False,
    quiet: common.Quiet = False,
    debug: common.Debug = False,
) -> None:
    """Serve CKPT over HTTP, exported first where the engine does not know its class."""
    found: dict[str, Any] = {}

    def work(_: TextIO) -> dict[str, Any]:
        from mhconvert import api

        with progress(quiet) as listener:
            found.update(
                api.serving(
                    checkpoint,
                    engine=engine,
                    output=output,
                    python=python,
                    host=host,
                    port=port,
                    dtype=dtype,
                    trust_remote_code=trust_remote_code,
                    on_progress=listener,
                )
            )
        return found

    try:
        execute(Flags(json, quiet, debug), work, _show, interrupted="interrupted")
    except typer.Exit as end:
        if end.exit_code or print_only:
            raise
    os.execvp(found["command"][0], found["command"])


def _show(result: dict[str, Any], console: Any) -> None:
    console.out(shlex.join(result["command"]), highlight=False)
