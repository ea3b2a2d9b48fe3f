"""Options of `mhconvert bench`."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

Contexts = Annotated[
    str, typer.Option(metavar="N,N,…", help="Tokens in the cache when the last timed step is done.")
]
Batch = Annotated[int, typer.Option(metavar="N", help="Rows that decode together; prefill is timed on one.")]
NewTokens = Annotated[int, typer.Option(metavar="N", help="Timed decode steps a context.")]
StepTokens = Annotated[
    int, typer.Option(metavar="N", help="Tokens a row reads in a step, as assisted decoding verifies drafts.")
]
ChunkTokens = Annotated[
    int | None, typer.Option(metavar="N", help="Read the prompt in pieces of N tokens; without: at once.")
]
Reexpand = Annotated[
    bool, typer.Option("--reexpand", help="Also time CKPT as stock classes run it: expanded in every step.")
]
StaticCache = Annotated[bool, typer.Option("--static-cache", help="Allocate the whole cache beforehand.")]
Compile = Annotated[
    bool, typer.Option("--compile", help="torch.compile the decode step; brings --static-cache along.")
]
Random = Annotated[
    bool,
    typer.Option("--random", help="CKPT is a donor: time random weights of its shape and its conversion's."),
]
RunDtype = Annotated[
    Literal["float32", "bfloat16", "float16"] | None,
    typer.Option(help="To compute in; bfloat16 on CUDA, else float32."),
]
