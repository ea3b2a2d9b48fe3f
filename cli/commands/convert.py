"""`mhconvert DONOR --to METHOD`: a pretrained model in, a converted checkpoint out, or an adapter for it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer

from ...convert.methods.registry import ADAPTERS, METHOD_NAMES, info
from ...convert.recipe.heal_settings import HealSettings, token_count
from ...convert.recipe.recipe import Recipe
from .. import adapter_tables
from ..options import common
from ..options.common import ANY_METHOD, CALIBRATION, TOLERANCE, method_groups, recipe_group
from ..options.from_settings import Group, readable, settings_options
from ..options.to_recipe import recipe_of, require_applicable
from ..output import Flags, calm_transformers, execute, show_report, shown
from ..progress import progress

HealFor = Annotated[
    str | None,
    typer.Option(
        "--heal",
        callback=readable(token_count),
        metavar="N",
        help="Then heal the result on N tokens of the calibration text: 200k, 20M.",
    ),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the plan and its costs; write nothing.")]
Survey = Annotated[
    bool,
    typer.Option(
        "--survey",
        help="With --dry-run: read DONOR and divide the budget over its layers; with --json a file for --plan.",
    ),
]
Pages = Annotated[
    list[Path] | None,
    typer.Option(
        "--report",
        metavar="FILE",
        help="With --survey, where layers become windowed or linear: draw each one's prices as a page, .html or .md; "
        "repeatable.",
    ),
]
OF_A_PASS = ("heal", "resume", "survey")  # options of this command that an adapter has no use for
INTERRUPTED = "interrupted; the same command with --resume continues after what is finished"


def groups() -> tuple[Group, ...]:
    """The options of the methods that are known, and those of every conversion."""
    return (
        *method_groups(METHOD_NAMES),
        TOLERANCE,
        recipe_group("Conversion", "effort", "fit_steps"),
        CALIBRATION,
        recipe_group("Output", "dtype", "device", "max_shard_size", "verify"),
        ANY_METHOD,
    )


@settings_options(*groups(), of_a_pass=OF_A_PASS)
def command(
    donor: common.Donor,
    to: common.Method,
    output: common.Output = None,
    heal: HealFor = None,
    resume: common.Resume = False,
    force: common.Force = False,
    dry_run: DryRun = False,
    survey: Survey = False,
    report: Pages = None,
    json: common.Json = False,
    quiet: common.Quiet = False,
    debug: common.Debug = False,
    **options: Any,
) -> None:
    """Convert DONOR's attention, or put an adapter beside it; DONOR itself is only read."""
    require_applicable(to, groups(), options)
    for name, value in zip(OF_A_PASS, (heal, resume, survey), strict=True):
        if to in ADAPTERS and value:
            raise typer.BadParameter(f"--{name} does not apply to {to}")
    if survey and not dry_run:
        raise typer.BadParameter("--survey goes with --dry-run: a conversion surveys by itself")
    if report and not (survey and info(to).layer_kind):
        raise typer.BadParameter("--report draws a --survey of layers that become windowed or linear")

    def work(_: TextIO) -> dict[str, Any]:
        from mhconvert import api

        calm_transformers()
        healing = _healing(heal, options)
        recipe = recipe_of(donor, to, groups(), options, output=common.written(output), heal=healing)
        if dry_run:
            return _planned(recipe, survey, report or [], quiet)
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


def _planned(recipe: Recipe, survey: bool, report: list[Path], quiet: bool) -> dict[str, Any]:
    """The plan of a conversion; of a survey the pages in `report` are written."""
    from mhconvert import api

    from ...eval.page import page

    for path in report:
        page.check(path)
    with progress(quiet or not survey) as listener:
        plan = api.plan(recipe, survey=survey, on_progress=listener)
    if report:
        from ...eval.page.layer_kinds import survey_page

        for path in report:
            page.write_blocks(path, f"Layers of {plan['donor']}", survey_page(plan))
    return plan


def _healing(tokens: str | None, options: Mapping[str, Any]) -> HealSettings | None:
    """The settings of `--heal N`; the other options of healing belong to `mhconvert heal` and to recipes."""
    if tokens is None:
        return None
    data = dict.fromkeys(options["calibration"] or ["self"], 1.0)
    return HealSettings(tokens=tokens, data=data, seed=options["seed"] or 0, device=options["device"])


def active_heads(plan: dict[str, Any]) -> list[tuple[str, str]]:
    """The row of a plan that says how many heads a token has; none for methods that keep all."""
    heads = plan.get("active_heads")
    return [("active heads a token", f"{heads['converted']} of {heads['donor']}")] if heads else []


def length_rows(plan: dict[str, Any]) -> list[tuple[str, str]]:
    """The rows of a plan with windows or states: at which length the cache is counted, and what it is at others."""
    from ...eval.report.length_rows import by_length

    cache, lengths = plan["kv_bytes_per_token"], plan.get("windows") or plan.get("states")
    if not lengths:
        return []
    from ...eval.report.units import size

    context = lengths["context"]
    return [
        (
            f"KV cache of {context:,} tokens",
            f"{size(cache['donor'] * context)} → {size(cache['converted'] * context)}",
        ),
        *by_length(plan),
    ]


def expected_time(plan: dict[str, Any]) -> list[tuple[str, str]]:
    """The row of the time, where the plan has one."""
    from ...eval.report.units import duration

    seconds = plan.get("expected_seconds")
    return [("time expected, on this machine while idle", duration(sum(seconds.values())))] if seconds else []


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
        *length_rows(plan),
        ("size of the result", size(plan.get("output_bytes"))),
        ("disk needed", size(plan.get("disk_needed_bytes"))),
        ("memory needed", size(plan.get("memory_needed_bytes"))),
        *expected_time(plan),
    ):
        table.add_row(name, value)
    for label, key in info(plan["method"]).sizes:
        widths = [layer[key] for layer in plan.get("layers", []) if key in layer]
        if widths:
            low, high = min(widths), max(widths)
            table.add_row(label, str(low) if low == high else f"{low} to {high}, by layer")
    console.print(table)
    _show_layers(plan, console)
    for notice in (plan.get("notice"), plan.get("cache_estimate"), plan.get("calibration", {}).get("notice")):
        if notice:
            console.out(notice, highlight=False)


def _show_layers(plan: dict[str, Any], console: Any) -> None:
    """Print a surveyed plan's layers, where they are of several kinds: each one's kind, cache and prices."""
    from rich.table import Column, Table

    from ...eval.report.layer_kinds import kind_rows, kinds_known, picture, price_notes

    if not kinds_known(plan):
        return
    console.out(picture(plan["layers"]), highlight=False)
    if not (notes := price_notes(plan)):
        return
    titles, *rows = kind_rows(plan["layers"])
    table = Table(*(Column(title, justify="right") for title in titles))
    for row in rows:
        table.add_row(*row)
    console.print(table)
    for note in notes:
        console.print(note, highlight=False, markup=False)
