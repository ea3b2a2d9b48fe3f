"""`mhconvert merge ADAPTER`: an adapter and its base model in, a plain checkpoint out."""

from __future__ import annotations

from typing import Any, TextIO

from mhconvert.cli import adapter as adapters
from mhconvert.cli import options as o
from mhconvert.cli.output import Flags, calm_transformers, execute, shown
from mhconvert.cli.progress import progress


def command(
    adapter: o.Adapter,
    output: o.MergeOutput = None,
    base: o.Base = None,
    dtype: o.MergedDtype = None,
    max_shard_size: o.MaxShardSize = "5GB",
    force: o.Force = False,
    trust_remote_code: o.Trust = False,
    json: o.Json = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:
    """Merge a Hydra or LoRA adapter into its base model: a checkpoint that loads without peft and mhconvert."""

    def work(_: TextIO) -> dict[str, Any]:
        from mhconvert import api

        calm_transformers()
        with progress(quiet) as listener:
            return api.merge(
                adapter,
                str(output) if output is not None else None,
                base=base,
                dtype=dtype,
                max_shard_size=max_shard_size,
                force=force,
                trust_remote_code=trust_remote_code,
                on_progress=listener,
            )

    execute(Flags(json, quiet, debug), work, shown(quiet, adapters.show_merged))
