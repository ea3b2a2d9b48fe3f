"""Options of adapters: a new one, and one that is merged."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

# A new adapter
RPar = Annotated[
    int | None, typer.Option(metavar="N", help="hydra: rank of the branch that reads a module's input; 8.")
]


RSeq = Annotated[
    int | None, typer.Option(metavar="N", help="hydra: rank of the branch that reads a module's output; 8.")
]


Targets = Annotated[
    str | None,
    typer.Option(
        metavar="NAME,NAME,…",
        help="hydra: linear modules, by the end of their names, or all-linear; o_proj,down_proj.",
    ),
]


Scale = Annotated[
    float | None, typer.Option(metavar="S", help="hydra: what both branches are multiplied by; 1.")
]


Dropout = Annotated[
    float | None,
    typer.Option(
        metavar="P",
        help="hydra: dropout between a branch's matrices in training, where it is not what merging gives; 0.",
    ),
]


# Adapters
Adapter = Annotated[str, typer.Argument(metavar="ADAPTER", help="The folder of a saved adapter.")]


Base = Annotated[
    str | None, typer.Option(metavar="DONOR", help="Its base model; the one that ADAPTER names.")
]


MergeOutput = Annotated[
    Path | None, typer.Option("--output", "-o", metavar="OUT", help="Folder to write; ./ADAPTER-merged.")
]


MergedDtype = Annotated[
    Literal["float32", "bfloat16", "float16"] | None,
    typer.Option(help="Of the written weights; each as the base model stores it (GGUF: float32)."),
]
