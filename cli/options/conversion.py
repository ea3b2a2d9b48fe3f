"""The options of the command line as types: flag, unit and effect of each in one place."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from mhconvert.errors import BudgetError

from ...convert.methods.registry import CACHE_METHODS, METHOD_NAMES, METHODS
from ...convert.recipe.tolerance import parse


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
MaxShardSize = Annotated[str, typer.Option(metavar="SIZE", help="Of one safetensors file.")]
NoVerify = Annotated[
    bool, typer.Option("--no-verify", help="Skip the reload in a bare process (it holds the whole model).")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the plan and its costs; write nothing.")]

Survey = Annotated[
    bool,
    typer.Option(
        "--survey",
        help="With --dry-run: read DONOR and divide the budget over its layers; with --json a file for --plan.",
    ),
]


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
