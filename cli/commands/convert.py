"""`mhconvert DONOR --to METHOD`: a pretrained model in, a converted checkpoint out, or an adapter for it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer

from ...convert.methods.registry import ADAPTERS, METHOD_NAMES, info
from ...convert.recipe.heal_settings import HealSettings, token_count
from ...convert.recipe.recipe import Recipe
from ...convert.recipe.steps import methods_of
from .. import adapter_tables, plan_tables
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
        help="With --dry-run: read DONOR and divide the budget over its layers; with --json a file for --plan. Of a "
        "chain the first step is surveyed, and its layers are in steps[0].",
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
    then: common.Then = None,
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
    methods = (*methods_of(to), *(methods_of(then) if then else ()))
    require_applicable(methods, groups(), options)
    for name, value in zip(OF_A_PASS, (heal, resume, survey), strict=True):
        if to in ADAPTERS and value:
            raise typer.BadParameter(f"--{name} does not apply to {to}")
    if survey and not dry_run:
        raise typer.BadParameter("--survey goes with --dry-run: a conversion surveys by itself")
    if report and not (survey and info(methods[0]).layer_kind):
        raise typer.BadParameter("--report draws a --survey of layers that become windowed or linear")

    def work(_: TextIO) -> dict[str, Any]:
        from mhconvert import api

        calm_transformers()
        healing = _healing(heal, options)
        recipe = recipe_of(donor, methods, groups(), options, output=common.written(output), heal=healing)
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
        plan_tables.show if dry_run else shown(quiet, _show),
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

        drawn = plan.get("steps", [plan])[0]
        for path in report:
            page.write_blocks(path, f"Layers of {drawn['donor']}", survey_page(drawn))
    return plan


def _healing(tokens: str | None, options: Mapping[str, Any]) -> HealSettings | None:
    """The settings of `--heal N`; the other options of healing belong to `mhconvert heal` and to recipes."""
    if tokens is None:
        return None
    data = dict.fromkeys(options["calibration"] or ["self"], 1.0)
    return HealSettings(tokens=tokens, data=data, seed=options["seed"] or 0, device=options["device"])


def _show(report: dict[str, Any], console: Any) -> None:
    """Print the conversion, and the adapter behind it."""
    show_report(report, console)
    if "adapter" in report:
        adapter_tables.show_new(report["adapter"], console)
