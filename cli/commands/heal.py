"""`mhconvert heal CKPT`: train a converted checkpoint to predict as its donor does."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer

from ...convert.recipe.heal_settings import HealSettings
from ...convert.recipe.weighted_names import sources
from ...convert.storage.folder_kind import is_adapter
from ...convert.validation.option import declared
from ..options import common
from ..options.from_settings import Group, settings_options, values_of
from ..options.ignored import refuse_ignored
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
    "on_policy",
    "on_policy_loss",
    "teacher",
    "train",
    "rank",
    "loss",
    "fusion",
    "router",
)
END_TO_END = (
    "rank",
    "loss",
    "lr",
    "schedule",
    "warmup",
    "weight_decay",
    "clip",
    "gradient_checkpointing",
    "eval_tokens",
    "save_tokens",
    "router",
    "on_policy",
    "on_policy_loss",
)  # of the training on --tokens alone
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
    _refuse_ignored(checkpoint, options)
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


def _refuse_ignored(checkpoint: str, options: Mapping[str, Any]) -> None:
    """Raise BadParameter for an option of what is not trained, or not read."""
    if options["tokens"] is None:
        refuse_ignored(
            options, END_TO_END, "is of --tokens, and --layer-tokens alone fits layers: leave it out"
        )
    if is_adapter(Path(checkpoint).expanduser()):
        refuse_ignored(options, ("rank",), f"is of a new adapter, and {checkpoint} has its own: leave it out")
    train = options["train"] or ("lora" if options["fusion"] is None else "attention")
    if train not in ("lora", "hydra"):
        refuse_ignored(options, ("rank",), f"is of --train lora and hydra, not of {train}: leave it out")
    if options["on_policy"] is None:
        refuse_ignored(options, ("on_policy_loss",), "is of --on-policy: give that too, or leave it out")
    if options["skip_bad"] and (not options["data"] or set(sources(options["data"])) == {"self"}):
        refuse_ignored(
            options, ("skip_bad",), "is of files and datasets; --data self has no records: leave it out"
        )
