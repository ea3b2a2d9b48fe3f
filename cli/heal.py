"""`mhconvert heal CKPT`: a converted checkpoint in, one that predicts more as its donor does out."""

from __future__ import annotations

from typing import Any, TextIO

import typer

from mhconvert.cli import options as o
from mhconvert.cli.output import Flags, calm_transformers, execute, show_report, shown
from mhconvert.cli.progress import progress
from mhconvert.convert.errors import HealError
from mhconvert.convert.heal_settings import HealSettings, weighted

INTERRUPTED = "interrupted; the same command with --resume continues after the last durable checkpoint"
OF_THE_COMMAND = (
    *("checkpoint", "output", "resume", "force", "no_verify", "tensorboard", "trust_remote_code"),
    *("json", "quiet", "debug"),
)  # the other options are settings


def command(
    checkpoint: o.Healed,
    tokens: o.HealTokens = None,
    data: o.HealData = None,
    output: o.HealOutput = None,
    teacher: o.Teacher = None,
    train: o.Train = None,
    rank: o.HealRank = 16,
    loss: o.Loss = "kl",
    fusion: o.HeadFusion = None,
    router: o.HealRouter = "fixed",
    layer_tokens: o.LayerTokens = "0",
    lm_tokens: o.LmTokens = "0",
    lr: o.Lr = None,
    schedule: o.ScheduleOption = "cosine",
    warmup: o.Warmup = 0.1,
    weight_decay: o.WeightDecay = 0.0,
    clip: o.Clip = 1.0,
    batch_tokens: o.BatchTokens = None,
    micro_batch: o.MicroBatch = None,
    sequence_length: o.HealRowLength = None,
    gradient_checkpointing: o.GradientCheckpointing = False,
    held_out: o.HeldOut = 4,
    epochs: o.Epochs = 1,
    eval_tokens: o.EvalTokens = None,
    save_tokens: o.SaveTokens = None,
    seed: o.Seed = 0,
    device: o.HealDevice = None,
    tensorboard: o.TensorBoard = None,
    no_verify: o.NoVerify = False,
    resume: o.ResumeHealing = False,
    force: o.Force = False,
    trust_remote_code: o.Trust = False,
    json: o.Json = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:
    """Distil the donor's predictions into CKPT; runs alone or under `accelerate launch -m mhconvert.heal`."""
    given = locals()
    if tokens is None and layer_tokens == "0":
        raise typer.BadParameter("say how much to heal on, for example --tokens 20M", param_hint="--tokens")
    chosen = {
        name: value for name, value in given.items() if name not in OF_THE_COMMAND and value is not None
    }
    chosen["data"] = sources(data or ["self"])
    try:
        settings = HealSettings(**chosen)
    except HealError as error:
        raise typer.BadParameter(str(error)) from error

    def work(_: TextIO) -> dict[str, Any]:
        from mhconvert import api

        calm_transformers()
        with progress(quiet) as listener:
            return api.heal(
                checkpoint,
                settings,
                output=str(output) if output is not None else None,
                resume=resume,
                force=force,
                verify=not no_verify,
                tensorboard=tensorboard,
                trust_remote_code=trust_remote_code,
                on_progress=listener,
            )

    execute(Flags(json, quiet, debug), work, shown(quiet, show_report), interrupted=INTERRUPTED)


def sources(words: list[str]) -> dict[str, float]:
    """{"books.txt": 2.0, "self": 1.0} from ["books.txt=2", "self"]."""
    return {name: 1.0 if share is None else share for name, share in map(weighted, words)}
