"""`mhconvert DONOR --to METHOD`: a pretrained model in, a converted checkpoint out, or an adapter for it."""

from __future__ import annotations

from typing import Any, TextIO

import typer

from mhconvert.errors import HealError

from ...convert.methods.registry import ADAPTERS
from ...convert.recipe.heal_settings import HealSettings, token_count
from .. import adapter_tables
from ..options import adapters, common
from ..options import conversion as o
from ..options.to_recipe import method_options, recipe_of
from ..output import Flags, calm_transformers, execute, show_report, shown
from ..progress import progress

SIZES = (
    ("latent width", "kv_lora_rank"),
    ("rotary key width", "qk_rope_head_dim"),
    ("K and V heads", "kv_heads"),
    ("K heads", "k_heads"),
    ("V heads", "v_heads"),
    ("heads of a token", "active_heads"),
    ("heads of every token", "shared_heads"),
)
INTERRUPTED = "interrupted; the same command with --resume continues after what is finished"


def command(
    donor: o.Donor,
    to: o.Method,
    output: o.Output = None,
    kv_budget: o.KvBudget = None,
    kv_lora_rank: o.KvLoraRank = None,
    qk_rope_head_dim: o.QkRopeHeadDim = None,
    profile: o.Profile = None,
    uniform: o.Uniform = None,
    regroup: o.Regroup = None,
    min_heads: o.MinHeads = None,
    max_heads: o.MaxHeads = None,
    head_multiple: o.HeadMultiple = None,
    plan: o.Plan = None,
    fusion: o.Fusion = None,
    active: o.Active = None,
    shared: o.Shared = None,
    router: o.HeadRouter = None,
    shared_heads: o.SharedHeads = None,
    route: o.HeadRoute = None,
    tolerance: o.Tolerance = None,
    r_par: adapters.RPar = None,
    r_seq: adapters.RSeq = None,
    targets: adapters.Targets = None,
    scale: adapters.Scale = None,
    dropout: adapters.Dropout = None,
    effort: o.Effort = "default",
    fit_steps: o.FitSteps = None,
    calibration: o.Calibration = None,
    calibration_tokens: o.CalibrationTokens = None,
    sequence_length: o.RowLength = None,
    heal: o.HealFor = None,
    seed: common.Seed = 0,
    dtype: common.Dtype = None,
    device: common.Device = None,
    max_shard_size: o.MaxShardSize = "5GB",
    no_verify: o.NoVerify = False,
    resume: common.Resume = False,
    force: common.Force = False,
    dry_run: o.DryRun = False,
    survey: o.Survey = False,
    trust_remote_code: common.Trust = False,
    json: common.Json = False,
    quiet: common.Quiet = False,
    debug: common.Debug = False,
) -> None:
    """Convert DONOR's attention, or put an adapter beside it; DONOR itself is only read."""
    given = locals()
    settings = method_options(to, given)
    if survey and not dry_run:
        raise typer.BadParameter("--survey goes with --dry-run: a conversion surveys by itself")
    try:
        healing = _healing(heal, calibration, seed, device)
    except HealError as error:
        raise typer.BadParameter(str(error), param_hint="--heal") from error

    def work(_: TextIO) -> dict[str, Any]:
        from mhconvert import api

        calm_transformers()
        recipe = recipe_of(
            given,
            settings,
            tolerance=tolerance,
            output=str(output) if output is not None else None,
            max_shard_size=max_shard_size,
            verify=not no_verify,
            heal=healing,
        )
        if dry_run:
            with progress(quiet or not survey) as listener:
                return api.plan(recipe, survey=survey, on_progress=listener)
        with progress(quiet) as listener:
            return api.convert(recipe, resume=resume, force=force, on_progress=listener)

    if to in ADAPTERS:
        show = adapter_tables.show_plan if dry_run else shown(quiet, adapter_tables.show_new)
        execute(Flags(json, quiet, debug), work, show)
    execute(
        Flags(json, quiet, debug),
        work,
        show_plan if dry_run else shown(quiet, show_report),
        interrupted=INTERRUPTED,
    )


def _healing(tokens: str | None, calibration: list[str] | None, seed: int, device: str | None) -> Any:
    """The settings of `--heal N`; the other options of healing belong to `mhconvert heal` and to recipes."""
    if tokens is None:
        return None
    data = dict.fromkeys(calibration or ["self"], 1.0)
    return HealSettings(tokens=token_count(tokens), data=data, seed=seed, device=device)


def active_heads(plan: dict[str, Any]) -> list[tuple[str, str]]:
    """The line of a plan that leaves heads out."""
    heads = plan.get("active_heads")
    return [("active heads a token", f"{heads['converted']} of {heads['donor']}")] if heads else []


def show_plan(plan: dict[str, Any], console: Any) -> None:
    """Print what a conversion would do and need."""
    from rich.table import Table

    from ...eval.report.units import share, size

    cache, asked = plan["kv_bytes_per_token"], plan.get("tolerance")
    part = share(cache["converted"] / cache["donor"])
    console.out(f"{plan['donor']} → {plan['output']} (nothing was written)", highlight=False)
    table = Table(show_header=False)
    table.add_column("")
    table.add_column("", justify="right")
    for name, value in (
        ("method", plan["method"]),
        (
            "KV cache a token",
            f"{size(cache['donor'])} → {'at most ' if asked else ''}{size(cache['converted'])}",
        ),
        ("share of the donor's", f"the smallest within {asked}; it will be searched" if asked else part),
        *active_heads(plan),
        ("size of the result", size(plan.get("output_bytes"))),
        ("disk needed", size(plan.get("disk_needed_bytes"))),
        ("memory needed", size(plan.get("memory_needed_bytes"))),
    ):
        table.add_row(name, value)
    for label, key in SIZES:
        widths = [layer[key] for layer in plan.get("layers", []) if key in layer]
        if widths:
            low, high = min(widths), max(widths)
            table.add_row(label, str(low) if low == high else f"{low} to {high}, by layer")
    console.print(table)
