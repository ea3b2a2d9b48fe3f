"""`mhconvert heal CKPT`: a converted checkpoint in, one that predicts more as its donor does out."""

from __future__ import annotations

from typing import Any, TextIO

import typer

from mhconvert.errors import HealError

from ...convert.recipe.heal_settings import HealSettings, weighted
from ..options import common, healing
from ..options import conversion as o
from ..output import Flags, calm_transformers, execute, show_report, shown
from ..progress import progress

INTERRUPTED = "interrupted; the same command with --resume continues after the last durable checkpoint"
OF_THE_COMMAND = (
    *("checkpoint", "output", "resume", "force", "no_verify", "tensorboard", "trust_remote_code"),
    *("json", "quiet", "debug"),
)  # the other options are settings


def command(
    checkpoint: healing.Healed,
    tokens: healing.HealTokens = None,
    data: healing.HealData = None,
    output: healing.HealOutput = None,
    teacher: healing.Teacher = None,
    train: healing.Train = None,
    rank: healing.HealRank = 16,
    loss: healing.Loss = "kl",
    fusion: healing.HeadFusion = None,
    router: healing.HealRouter = "fixed",
    layer_tokens: healing.LayerTokens = "0",
    lm_tokens: healing.LmTokens = "0",
    lr: healing.Lr = None,
    schedule: healing.ScheduleOption = "cosine",
    warmup: healing.Warmup = 0.1,
    weight_decay: healing.WeightDecay = 0.0,
    clip: healing.Clip = 1.0,
    batch_tokens: healing.BatchTokens = None,
    micro_batch: healing.MicroBatch = None,
    sequence_length: healing.HealRowLength = None,
    gradient_checkpointing: healing.GradientCheckpointing = False,
    held_out: healing.HeldOut = 4,
    epochs: healing.Epochs = 1,
    eval_tokens: healing.EvalTokens = None,
    save_tokens: healing.SaveTokens = None,
    seed: common.Seed = 0,
    device: healing.HealDevice = None,
    tensorboard: healing.TensorBoard = None,
    no_verify: o.NoVerify = False,
    resume: healing.ResumeHealing = False,
    force: common.Force = False,
    trust_remote_code: common.Trust = False,
    json: common.Json = False,
    quiet: common.Quiet = False,
    debug: common.Debug = False,
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
