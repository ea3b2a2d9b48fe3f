"""`mhconvert export ADAPTER --to lora`: the same function in a form that others load."""

from __future__ import annotations

from typing import Any, TextIO

from mhconvert.cli import adapter as adapters
from mhconvert.cli import options as o
from mhconvert.cli.output import Flags, calm_transformers, execute, shown
from mhconvert.cli.progress import progress


def command(
    adapter: o.Adapter,
    to: o.ExportTo,
    output: o.ExportOutput = None,
    base: o.Base = None,
    force: o.Force = False,
    trust_remote_code: o.Trust = False,
    json: o.Json = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:
    """Write a Hydra adapter as a LoRA of rank r_par + r_seq that computes the same, for peft and LoRA servers."""

    def work(_: TextIO) -> dict[str, Any]:
        from mhconvert import api

        calm_transformers()
        with progress(quiet) as listener:
            return api.export(
                adapter,
                to,
                str(output) if output is not None else None,
                base=base,
                force=force,
                trust_remote_code=trust_remote_code,
                on_progress=listener,
            )

    execute(Flags(json, quiet, debug), work, shown(quiet, adapters.show_exported))
