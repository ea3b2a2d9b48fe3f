"""Options that most commands have."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

# Every command
Json = Annotated[bool, typer.Option("--json", help="Print exactly one JSON object on stdout.")]


Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")]


Debug = Annotated[bool, typer.Option("--debug", help="Show warnings, logs and the traceback of an error.")]


Device = Annotated[
    str | None, typer.Option(metavar="DEVICE", help="Torch device; CUDA if present, else the CPU.")
]


Trust = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python code that comes inside the model folder.")
]


Seed = Annotated[int, typer.Option(metavar="N", help="Of every random choice.")]


Dtype = Annotated[
    Literal["float32", "bfloat16", "float16"] | None,
    typer.Option(help="Of the written weights; the donor's (GGUF: float32)."),
]


Resume = Annotated[bool, typer.Option("--resume", help="Continue an interrupted conversion.")]


Force = Annotated[bool, typer.Option("--force", help="Replace OUT if it exists.")]
