"""Options of `mhconvert heal`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

# Healing
Healed = Annotated[str, typer.Argument(metavar="CKPT", help="A folder that mhconvert converted.")]


HealTokens = Annotated[
    str | None, typer.Option(metavar="N", help="Tokens to train on, end to end: 200k, 20M, 1.5B.")
]


HealData = Annotated[
    list[str] | None,
    typer.Option(
        metavar="SOURCE[=SHARE]",
        help="Text (.txt, .jsonl, quoted globs, a dataset's name, self: sampled from the teacher); repeatable; self.",
    ),
]


HealOutput = Annotated[
    Path | None, typer.Option("--output", "-o", metavar="OUT", help="Folder to write; ./CKPT-healed.")
]


Teacher = Annotated[
    str | None,
    typer.Option(
        metavar="DONOR", help="Model of the same tokenizer to learn from; the one CKPT was made from."
    ),
]


Train = Annotated[
    Literal["attention", "all", "lora", "hydra"] | None,
    typer.Option(
        help="What changes; lora (default) and hydra: an adapter on the attention, merged at the end."
    ),
]


HealRank = Annotated[int, typer.Option(metavar="N", help="Rank of lora and hydra.")]


Loss = Annotated[
    str,
    typer.Option(
        metavar="TERM[=W],…",
        help="kl: from the teacher's predictions; ce: the text itself; hidden: states behind each layer; balance: "
        "see --router.",
    ),
]


HeadFusion = Annotated[
    int | None,
    typer.Option(
        "--fusion",
        metavar="N",
        help="dha: train the heads of `--fusion trained` to be one, up to N together; 2, then 4, then 8.",
    ),
]


HealRouter = Annotated[
    Literal["fixed", "trained"],
    typer.Option(help="moh: whether what chooses heads learns too (loss: balance, of their load)."),
]


LayerTokens = Annotated[
    str, typer.Option(metavar="N", help="Before that: tokens on which each layer learns on its own.")
]


LmTokens = Annotated[
    str,
    typer.Option(
        metavar="N", help="Of --tokens, the last ones that teach the text alone, without the teacher."
    ),
]


Lr = Annotated[
    float | None, typer.Option(metavar="RATE", help="Peak learning rate; by what --train changes.")
]


ScheduleOption = Annotated[
    Literal["cosine", "wsd", "constant"],
    typer.Option("--schedule", help="Of the learning rate; wsd: warm-up, stable, decay."),
]


Warmup = Annotated[float, typer.Option(metavar="SHARE", help="Of the steps.")]


WeightDecay = Annotated[float, typer.Option(metavar="W", help="Of matrices; norms and biases never decay.")]


Clip = Annotated[float, typer.Option(metavar="NORM", help="The gradient's norm at most.")]


BatchTokens = Annotated[
    str | None,
    typer.Option(metavar="N", help="Tokens a step, all processes; a two-hundredth of --tokens, 1k to 64k."),
]


MicroBatch = Annotated[
    int | None,
    typer.Option(metavar="ROWS", help="In memory at a time, of one process; 2 on a CPU, 8 on a GPU."),
]


HealRowLength = Annotated[
    int | None, typer.Option("--sequence-length", metavar="N", help="Tokens a row; 1024.")
]


GradientCheckpointing = Annotated[
    bool, typer.Option("--gradient-checkpointing", help="Less memory, a third more time.")
]


HeldOut = Annotated[
    int, typer.Option(metavar="ROWS", help="Never trained on; what is measured is measured there.")
]


Epochs = Annotated[int, typer.Option(metavar="N", help="Times that text may be read, if it is short.")]


EvalTokens = Annotated[
    str | None, typer.Option(metavar="N", help="Between two measurements; a tenth of --tokens.")
]


SaveTokens = Annotated[
    str | None, typer.Option(metavar="N", help="Between two durable checkpoints; a tenth of --tokens.")
]


HealDevice = Annotated[
    Literal["cpu", "cuda"] | None,
    typer.Option(help="CUDA if present; CUDA_VISIBLE_DEVICES chooses among GPUs."),
]


TensorBoard = Annotated[
    Path | None, typer.Option(metavar="FOLDER", help="Also write a TensorBoard log there.")
]


ResumeHealing = Annotated[bool, typer.Option("--resume", help="Continue an interrupted run.")]
