"""`mhconvert merge ADAPTER`: an adapter and its base model in, a plain checkpoint out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, TextIO

import typer

from ...convert.storage.byte_size import DEFAULT_SHARD_SIZE
from .. import adapter_tables
from ..options import common
from ..output import Flags, calm_transformers, execute, shown
from ..progress import progress

Adapter = Annotated[str, typer.Argument(metavar="ADAPTER", help="The folder of a saved adapter.")]
Output = Annotated[
    Path | None, typer.Option("--output", "-o", metavar="OUT", help="Folder to write; ./ADAPTER-merged.")
]
Dtype = Annotated[
    Literal["float32", "bfloat16", "float16"] | None,
    typer.Option(help="Of the written weights; each as the base model stores it (GGUF: float32)."),
]


def command(
    adapter: Adapter,
    output: Output = None,
    base: common.Base = None,
    dtype: Dtype = None,
    max_shard_size: common.MaxShardSize = DEFAULT_SHARD_SIZE,
    force: common.Force = False,
    trust_remote_code: common.Trust = False,
    json: common.Json = False,
    quiet: common.Quiet = False,
    debug: common.Debug = False,
) -> None:
    """Merge a Hydra or LoRA adapter into its base model: a checkpoint that loads without peft and mhconvert."""

    def work(_: TextIO) -> dict[str, Any]:
        from mhconvert import api

        calm_transformers()
        with progress(quiet) as listener:
            return api.merge(
                adapter,
                common.written(output),
                base=base,
                dtype=dtype,
                max_shard_size=max_shard_size,
                force=force,
                trust_remote_code=trust_remote_code,
                on_progress=listener,
            )

    execute(Flags(json, quiet, debug), work, shown(quiet, adapter_tables.show_merged))
