"""The options of the command line as types: flag, unit and effect of each in one place."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from mhconvert.convert.errors import BudgetError
from mhconvert.convert.methods import CACHE_METHODS, METHOD_NAMES, METHODS
from mhconvert.convert.tolerance import parse


def _one_of(names: Collection[str], kind: str) -> Callable[[str], str]:
    """A check that a word names a method among `names`, which are said to be of this `kind`."""

    def check(name: str) -> str:
        if name not in names:
            raise typer.BadParameter(f"'{name}' is not a method{kind}; choose one of {', '.join(names)}")
        return name

    return check


def _known_tolerance(text: str | None) -> str | None:
    try:
        return None if text is None else str(parse(text))
    except BudgetError as error:
        raise typer.BadParameter(str(error)) from error


def _shares(text: str | None) -> str | None:
    try:
        _ = text is None or [float(word) for word in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"'{text}' is no list of shares such as 0.75,0.5,0.25") from None
    return text


def _counts(text: str | None) -> Any:
    """0.75 from "0.75", [7, 8, 0.5] from "7,8,0.5"."""
    if text is None:
        return None
    try:
        found = [int(word) if word.strip().isdigit() else float(word) for word in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"'{text}' is neither a share of heads nor a list such as 7,8,8,9") from None
    return found if len(found) > 1 else found[0]


# Every command
Json = Annotated[bool, typer.Option("--json", help="Print exactly one JSON object on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show warnings, logs and the traceback of an error.")]
Device = Annotated[
    str | None, typer.Option(metavar="DEVICE", help="Torch device; CUDA if present, else the CPU.")
]
Trust = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python code that comes inside the model folder.")
]

# Conversion
Donor = Annotated[
    str, typer.Argument(metavar="DONOR", help="Alias, org/name[@revision], folder, or .gguf file.")
]
Method = Annotated[
    str,
    typer.Option(
        "--to",
        callback=_one_of(METHOD_NAMES, ""),
        metavar="METHOD",
        help="mla: latent attention; dha: fewer K and V heads; moh: some heads a token; hydra: an untrained adapter "
        "beside DONOR.",
    ),
]
AnyMethod = Annotated[
    str,
    typer.Option(
        "--to",
        callback=_one_of(METHODS, " that rewrites layers"),
        metavar="METHOD",
        help="With --random, the conversion to time: mla, dha, or moh, whose --kv-budget is its share of active heads.",
    ),
]
CacheMethod = Annotated[
    str,
    typer.Option(
        "--to",
        callback=_one_of(CACHE_METHODS, " that changes the KV cache"),
        metavar="METHOD",
        help="mla: latent attention; dha: fewer K and V heads.",
    ),
]
Output = Annotated[
    Path | None, typer.Option("--output", "-o", metavar="OUT", help="Folder to write; ./DONOR-METHOD.")
]
KvBudget = Annotated[
    float | None,
    typer.Option(metavar="SHARE", help="Share of the donor's KV elements to keep, in (0, 1]; 0.5."),
]
KvLoraRank = Annotated[
    int | None, typer.Option(metavar="N", help="Width of the latent, instead of --kv-budget.")
]
QkRopeHeadDim = Annotated[
    int | None, typer.Option(metavar="N", help="Width of the rotary key, instead of --kv-budget.")
]
Profile = Annotated[
    Literal["quality", "portable"] | None,
    typer.Option(help="quality: sizes may differ by layer (default); portable: one size for all layers."),
]
Uniform = Annotated[
    bool | None,
    typer.Option(
        "--uniform",
        help="dha: as many K as V heads in every layer: the donor's own architecture, no remote code; "
        "moh: as many active heads.",
    ),
]
Regroup = Annotated[
    bool | None,
    typer.Option(
        "--regroup/--no-regroup",
        help="dha: whether query heads of one KV head may part; they may, beyond nine if that measures better.",
    ),
]
MinHeads = Annotated[
    int | None, typer.Option(metavar="N", help="dha: K heads, and V heads, of any layer at least; 1.")
]
MaxHeads = Annotated[
    int | None, typer.Option(metavar="N", help="dha: K heads, and V heads, of any layer at most; DONOR's.")
]
HeadMultiple = Annotated[
    int | None, typer.Option(metavar="N", help="dha: numbers of heads are multiples of N; 1.")
]
Plan = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="dha: the heads of every layer, as in the mhconvert.json of a conversion; not --kv-budget.",
    ),
]
Fusion = Annotated[
    Literal["closed", "trained"] | None,
    typer.Option(help="dha: closed: heads are fused; trained: left for heal --fusion to fuse; closed."),
]
Active = Annotated[
    str | None,
    typer.Option(
        metavar="SHARE|LIST",
        callback=_counts,
        help="moh: heads that a token has, as a share of all, or a list with a number or share for each layer; 0.75.",
    ),
]
Shared = Annotated[
    str | None,
    typer.Option(
        metavar="SHARE|LIST",
        callback=_counts,
        help="moh: heads that every token has, of the active ones; 0.5. As many as --active: fixed pruning.",
    ),
]
HeadRouter = Annotated[
    Literal["learned", "norm"] | None,
    typer.Option(
        help="moh: what chooses heads. learned: a linear map of the attention's input; norm: the size of their query, "
        "no parameters; learned."
    ),
]
SharedHeads = Annotated[
    Literal["calibrated", "first"] | None,
    typer.Option(
        help="moh: which heads are shared. calibrated: those that add most; first: the paper's rule, layers alike and "
        "sizes of queries as they are; calibrated."
    ),
]
HeadRoute = Annotated[
    Literal["heads", "groups"] | None,
    typer.Option(help="moh: what is routed. groups: whole KV heads, whose cache is then not read; heads."),
]
Tolerance = Annotated[
    str | None,
    typer.Option(
        callback=_known_tolerance,
        metavar="kl=NATS|ppl=RATIO",
        help="Instead of --kv-budget: the smallest budget within it on held-out text, such as kl=0.05 or ppl=1.05.",
    ),
]
Effort = Annotated[
    Literal["quick", "default", "high"],
    typer.Option(
        help="quick: the closed form alone; default: and a fit of every layer; high: two longer ones."
    ),
]
FitSteps = Annotated[
    int | None, typer.Option(metavar="N", help="Optimiser steps a layer, whatever the effort; 0: none.")
]
Calibration = Annotated[
    list[str] | None,
    typer.Option(
        metavar="FILE|DATASET|self",
        help="Text to calibrate on (.txt, .jsonl, quoted globs); may be repeated; self: sampled from DONOR (default).",
    ),
]
CalibrationTokens = Annotated[
    int | None, typer.Option(metavar="N", help="Calibration tokens in all; by source, device and effort.")
]
RowLength = Annotated[
    int | None, typer.Option(metavar="N", help="Tokens in a calibration row  [default: 512].")
]
HealFor = Annotated[
    str | None,
    typer.Option(
        "--heal", metavar="N", help="Then heal the result on N tokens of the calibration text: 200k, 20M."
    ),
]
Seed = Annotated[int, typer.Option(metavar="N", help="Of every random choice.")]
Dtype = Annotated[
    Literal["float32", "bfloat16", "float16"] | None,
    typer.Option(help="Of the written weights; the donor's (GGUF: float32)."),
]
MaxShardSize = Annotated[str, typer.Option(metavar="SIZE", help="Of one safetensors file.")]
NoVerify = Annotated[
    bool, typer.Option("--no-verify", help="Skip the reload in a bare process (it holds the whole model).")
]
Resume = Annotated[bool, typer.Option("--resume", help="Continue an interrupted conversion.")]
Force = Annotated[bool, typer.Option("--force", help="Replace OUT if it exists.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the plan and its costs; write nothing.")]

Survey = Annotated[
    bool,
    typer.Option(
        "--survey",
        help="With --dry-run: read DONOR and divide the budget over its layers; with --json a file for --plan.",
    ),
]

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

# Several budgets
Budgets = Annotated[
    str | None,
    typer.Option(callback=_shares, metavar="SHARE,SHARE,…", help="KV budgets to measure, in one pass."),
]
CurveOutput = Annotated[
    list[Path] | None,
    typer.Option(
        "--output",
        "-o",
        metavar="FILE",
        help="Write a plot (.svg, .png, .pdf) or all figures (.json); repeatable.",
    ),
]
ForceFile = Annotated[bool, typer.Option("--force", help="Replace FILE if it exists.")]
OwnText = Annotated[
    Path | None, typer.Option("--text", metavar="FILE", help="UTF-8 text to measure on, not held-out rows.")
]
TextRows = Annotated[int, typer.Option(metavar="N", help="Rows of --text.")]

# Measuring and generating
Model = Annotated[
    str, typer.Argument(metavar="DONOR_OR_CKPT", help="A donor, or a folder that mhconvert wrote.")
]
Checkpoint = Annotated[str, typer.Argument(metavar="CKPT", help="A folder that mhconvert wrote, or a donor.")]
Text = Annotated[Path, typer.Option(metavar="FILE", help="UTF-8 text to measure on.")]
Against = Annotated[
    str | None, typer.Option(metavar="DONOR", help="The model to compare with; the one CKPT was made from.")
]
SequenceLength = Annotated[int, typer.Option(metavar="L", help="Tokens a row.")]
Sequences = Annotated[int, typer.Option(metavar="N", help="Rows: the first N × L tokens are used.")]
Prompt = Annotated[str, typer.Argument(metavar="PROMPT", help="Text to continue.")]
MaxNewTokens = Annotated[int, typer.Option(metavar="N", help="Tokens to generate at most.")]
Chat = Annotated[bool, typer.Option("--chat", help="PROMPT is a user's message in the chat template.")]
Temperature = Annotated[float, typer.Option(metavar="T", help="0: greedy; above: sampled.")]

# Timing
Contexts = Annotated[
    str, typer.Option(metavar="N,N,…", help="Tokens in the cache when the last timed step is done.")
]
Batch = Annotated[int, typer.Option(metavar="N", help="Rows that decode together; prefill is timed on one.")]
NewTokens = Annotated[int, typer.Option(metavar="N", help="Timed decode steps a context.")]
Reexpand = Annotated[
    bool, typer.Option("--reexpand", help="Also time CKPT as stock classes run it: expanded in every step.")
]
StaticCache = Annotated[bool, typer.Option("--static-cache", help="Allocate the whole cache beforehand.")]
Compile = Annotated[
    bool, typer.Option("--compile", help="torch.compile the decode step; brings --static-cache along.")
]
Random = Annotated[
    bool,
    typer.Option("--random", help="CKPT is a donor: time random weights of its shape and its conversion's."),
]
RunDtype = Annotated[
    Literal["float32", "bfloat16", "float16"] | None,
    typer.Option(help="To compute in; bfloat16 on CUDA, else float32."),
]
