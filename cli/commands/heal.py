"""`mhconvert heal CKPT`: train a converted checkpoint to predict as its donor does."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, TextIO

import typer

from ...convert.recipe.heal_settings import HealSettings, sources
from ...convert.validation.option import declared
from ..options import common
from ..options.from_settings import Group, settings_options, values_of
from ..output import Flags, calm_transformers, execute, show_report, shown
from ..progress import progress

INTERRUPTED = "interrupted; the same command with --resume continues after the last durable checkpoint"
Healed = Annotated[str, typer.Argument(metavar="CKPT", help="A folder that mhconvert converted.")]
Output = Annotated[
    Path | None, typer.Option("--output", "-o", metavar="OUT", help="Folder to write; ./CKPT-healed.")
]
TensorBoard = Annotated[
    Path | None, typer.Option(metavar="FOLDER", help="Also write a TensorBoard log there.")
]
WHAT = (
    "tokens",
    "layer_tokens",
    "lm_tokens",
    "data",
    "skip_bad",
    "teacher",
    "train",
    "rank",
    "loss",
    "fusion",
    "router",
)
GROUPS = (
    Group("What trains, on what", HealSettings, WHAT),
    Group("How", HealSettings, [name for name in declared(HealSettings) if name not in WHAT]),
)


@settings_options(*GROUPS)
def command(
    checkpoint: Healed,
    output: Output = None,
    tensorboard: TensorBoard = None,
    no_verify: common.NoVerify = False,
    resume: common.Resume = False,
    force: common.Force = False,
    trust_remote_code: common.Trust = False,
    json: common.Json = False,
    quiet: common.Quiet = False,
    debug: common.Debug = False,
    **options: Any,
) -> None:
    """Distil the donor's predictions into CKPT; runs alone or under `accelerate launch -m mhconvert heal`."""
    if options["tokens"] is None and options["layer_tokens"] is None:
        raise typer.BadParameter("say how much to heal on, for example --tokens 20M", param_hint="--tokens")
    chosen = {name: value for group in GROUPS for name, value in values_of(group, options).items()}
    if "data" in chosen:
        chosen["data"] = sources(chosen["data"])

    def work(_: TextIO) -> dict[str, Any]:
        settings = HealSettings(**chosen)
        from mhconvert import api

        calm_transformers()
        with progress(quiet) as listener:
            return api.heal(
                checkpoint,
                settings,
                output=common.written(output),
                resume=resume,
                force=force,
                verify=not no_verify,
                tensorboard=tensorboard,
                trust_remote_code=trust_remote_code,
                on_progress=listener,
            )

    execute(Flags(json, quiet, debug), work, shown(quiet, show_report), interrupted=INTERRUPTED)
