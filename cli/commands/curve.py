"""`mhconvert curve`: what a conversion would cost and keep at several KV budgets, as a table and a plot."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, TextIO

import typer

from ...convert.methods.registry import CACHE_METHODS
from ...eval.settings import BASELINES, OWN_CACHE, EvalSettings
from ..options import common
from ..options.common import ANY_METHOD, CALIBRATION, method_groups, recipe_group
from ..options.from_settings import Group, settings_options
from ..options.ignored import refuse_ignored
from ..options.to_recipe import recipe_of, require_applicable
from ..output import Flags, calm_transformers, execute
from ..progress import progress


def _shares(text: str | None) -> str | None:
    try:
        _ = text is None or [float(word) for word in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"'{text}' is no list of shares such as 0.75,0.5,0.25") from None
    return text


Budgets = Annotated[
    str | None,
    typer.Option(callback=_shares, metavar="SHARE,SHARE,…", help="KV budgets to measure, in one pass."),
]
Output = Annotated[
    list[Path] | None,
    typer.Option(
        "--output",
        "-o",
        metavar="FILE",
        help="Write a plot (.svg, .png, .pdf) or all figures (.json); repeatable.",
    ),
]
Text = Annotated[
    Path | None, typer.Option("--text", metavar="FILE", help="UTF-8 text to measure on, not held-out rows.")
]
ROWS = 16  # of --text, where --sequences does not say it
TextRows = Annotated[int | None, typer.Option(metavar="N", help=f"Rows of --text.  [default: {ROWS}]")]
Baselines = Annotated[
    bool,
    typer.Option(
        "--baselines",
        help=f"Measure the donor with KV caches of {', '.join(BASELINES)} too, on the same text.",
    ),
]
FIELDS = (
    "profile",
    "kv_bits",
    "uniform",
    "equal_heads",
    "regroup",
    "min_heads",
    "max_heads",
    "head_multiple",
    "context",
    "window",
    "sinks",
    "full_layers",
    "linear",
    "linear_layers",
    "mixer",
)  # beside the budgets

RIVAL = Group("A KV cache of the donor, measured beside the curve", EvalSettings, ("kv_cache_dtype",))


def groups() -> tuple[Group, ...]:
    """The options of the methods that are known, and those of every conversion."""
    return (
        *method_groups(CACHE_METHODS, FIELDS),
        recipe_group("Conversion", "effort", "fit_steps", "dtype", "device"),
        CALIBRATION,
        ANY_METHOD,
    )


@settings_options(*groups(), RIVAL)
def command(
    donor: common.Donor,
    to: common.CacheMethod,
    budgets: Budgets = None,
    output: Output = None,
    text: Text = None,
    sequences: TextRows = None,
    baselines: Baselines = False,
    force: common.ForceFile = False,
    json: common.Json = False,
    quiet: common.Quiet = False,
    debug: common.Debug = False,
    **options: Any,
) -> None:
    """Measure DONOR's conversion at several KV budgets in one pass, and draw it. Writes no checkpoint.

    --baselines adds the unconverted donor with quantised caches, --kv-cache-dtype one such point; the conversion's
    own cache stays as it is, other than in generate, eval and bench.
    """
    require_applicable((to,), groups(), options)
    files = list(output or ())
    if text is None:
        refuse_ignored({"sequences": sequences}, ("sequences",), "is of --text: name one, or leave it out")
    if not files:
        refuse_ignored({"force": force}, ("force",), "replaces FILE: name one with -o, or leave it out")

    def work(_: TextIO) -> dict[str, Any]:
        from mhconvert import api

        from ...eval.report import curve_plot

        calm_transformers()
        curve_plot.check(files, force)
        recipe = recipe_of(donor, (to,), groups(), options)
        with progress(quiet) as listener:
            result = api.curve(
                recipe,
                None if budgets is None else [float(share) for share in budgets.split(",")],
                text=text,
                sequences=ROWS if sequences is None else sequences,
                baselines=_baselines(baselines, options["kv_cache_dtype"]),
                on_progress=listener,
            )
        for file in files:
            curve_plot.write(result, file)
        return result | {"files": list(map(str, files))}

    execute(Flags(json, quiet, debug), work, show)


def _baselines(all_of_them: bool, one: str | None) -> list[str]:
    """The dtypes of the donor's caches that are measured beside the curve."""
    asked = [*(BASELINES if all_of_them else ()), *([] if one in (None, OWN_CACHE) else [one])]
    return list(dict.fromkeys(asked))


def show(result: dict[str, Any], console: Any) -> None:
    """Print a curve, one budget a line."""
    from rich.table import Column, Table

    from ...eval.report.conversion_tables import curve_rows
    from ...eval.report.units import share

    steps = result["fit_steps"]
    how = f"{steps} fit steps a layer" if steps else "closed form"
    name = result.get("donor_name") or result["donor"]
    console.out(f"{name} → {result['method'].upper()}, {how}", highlight=False)
    on = f"{result['measured_tokens']:,} predictions on {result['measured_on']}"
    console.out(f"measured on {on}; donor's perplexity {result['perplexity']:.4g}", highlight=False)
    console.out(f"KV cache in % of {result['kv_share_of']}", highlight=False)
    head, *rows = curve_rows(result)
    table = Table(*(Column(title, justify="right") for title in head))
    for row in rows:
        table.add_row(*row)
    console.print(table)
    for dropped in result.get("same_size", ()):
        more, least = (share(dropped[name]) for name in ("kv_budget", "as"))
        console.out(
            f"a budget of {more} comes to the size of {least}, and is not another point", highlight=False
        )
    for file in result.get("files", ()):
        console.out(file, highlight=False)
