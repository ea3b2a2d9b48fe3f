"""`mhconvert run RECIPE`: from a donor to a published checkpoint by one file."""

from __future__ import annotations

from typing import Annotated, Any, TextIO

import typer

from ..evaluation_tables import show as show_evaluation
from ..options import common
from ..output import Flags, calm_harness, calm_transformers, execute, shown
from ..progress import progress

RecipeFile = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE", help="A YAML file, or the name of a recipe that ships (mhconvert recipes list)."
    ),
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        callback=common.readable_overrides,
        metavar="KEY=VALUE",
        help="In place of what RECIPE says: heal.tokens=1B; repeatable.",
    ),
]
Only = Annotated[
    str | None,
    typer.Option(metavar="STAGE,…", help="Of convert, heal, adapter, eval, export, push only these."),
]
Force = Annotated[
    bool, typer.Option("--force", help="Do stages again that are done, and replace what they wrote.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say which stages are done and which are to do.")]

INTERRUPTED = "interrupted; the same command goes on where it stopped"


def command(
    recipe: RecipeFile,
    set_: Set = None,
    only: Only = None,
    force: Force = False,
    dry_run: DryRun = False,
    json: common.Json = False,
    quiet: common.Quiet = False,
    debug: common.Debug = False,
) -> None:
    """Convert, heal, evaluate, export and push as RECIPE says; what an earlier run has done is not done again."""
    chosen = [word.strip() for word in (only or "").split(",") if word.strip()]

    def work(_: TextIO) -> dict[str, Any]:
        calm_harness(debug)
        from ...run import run_recipe

        calm_transformers()
        with progress(quiet) as listener:
            return run_recipe.run(
                recipe, set_ or [], only=chosen, force=force, dry_run=dry_run, on_progress=listener
            )

    execute(Flags(json, quiet, debug), work, shown(quiet, show), interrupted=INTERRUPTED)


def show(result: dict[str, Any], console: Any) -> None:
    """Print what each stage did, and the evaluation."""
    from rich.table import Table

    from ...eval.report.units import duration

    table = Table("stage", "", "output")
    for stage in result["stages"]:
        seconds = f" in {duration(stage['seconds'])}" if "seconds" in stage else ""
        table.add_row(
            stage["stage"], stage["status"] + seconds, str(stage.get("url") or stage["output"] or "")
        )
    console.print(table)
    if result["evaluation"]:
        show_evaluation(result["evaluation"], console)
