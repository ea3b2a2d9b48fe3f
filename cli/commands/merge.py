"""`mhconvert merge ADAPTER`: an adapter and its base model in, a plain checkpoint out."""

from __future__ import annotations

from typing import Any, TextIO

from .. import adapter_tables
from ..options import adapters, common
from ..options import conversion as o
from ..output import Flags, calm_transformers, execute, shown
from ..progress import progress


def command(
    adapter: adapters.Adapter,
    output: adapters.MergeOutput = None,
    base: adapters.Base = None,
    dtype: adapters.MergedDtype = None,
    max_shard_size: o.MaxShardSize = "5GB",
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
                str(output) if output is not None else None,
                base=base,
                dtype=dtype,
                max_shard_size=max_shard_size,
                force=force,
                trust_remote_code=trust_remote_code,
                on_progress=listener,
            )

    execute(Flags(json, quiet, debug), work, shown(quiet, adapter_tables.show_merged))
