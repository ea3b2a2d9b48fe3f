"""`mhconvert curve`: what a conversion would cost and keep at several KV budgets, as a table and a plot."""

from __future__ import annotations

from typing import Any, TextIO

from ..options import common
from ..options import conversion as o
from ..options.to_recipe import method_options, recipe_of
from ..output import Flags, calm_transformers, execute
from ..progress import progress


def command(
    donor: o.Donor,
    to: o.CacheMethod,
    budgets: o.Budgets = None,
    output: o.CurveOutput = None,
    profile: o.Profile = None,
    uniform: o.Uniform = None,
    regroup: o.Regroup = None,
    min_heads: o.MinHeads = None,
    max_heads: o.MaxHeads = None,
    head_multiple: o.HeadMultiple = None,
    effort: o.Effort = "default",
    fit_steps: o.FitSteps = None,
    calibration: o.Calibration = None,
    calibration_tokens: o.CalibrationTokens = None,
    sequence_length: o.RowLength = None,
    text: o.OwnText = None,
    sequences: o.TextRows = 16,
    seed: common.Seed = 0,
    dtype: common.Dtype = None,
    device: common.Device = None,
    force: o.ForceFile = False,
    trust_remote_code: common.Trust = False,
    json: common.Json = False,
    quiet: common.Quiet = False,
    debug: common.Debug = False,
) -> None:
    """Measure DONOR's conversion at several KV budgets in one pass, and draw it. Writes no checkpoint."""
    given = locals()
    settings = method_options(to, given)
    files = list(output or ())

    def work(_: TextIO) -> dict[str, Any]:
        from mhconvert import api

        from ...eval.report import curve_plot

        calm_transformers()
        curve_plot.check(files, force)
        recipe = recipe_of(given, settings)
        with progress(quiet) as listener:
            result = api.curve(
                recipe,
                None if budgets is None else [float(share) for share in budgets.split(",")],
                text=text,
                sequences=sequences,
                on_progress=listener,
            )
        for file in files:
            curve_plot.write(result, file)
        return result | {"files": list(map(str, files))}

    execute(Flags(json, quiet, debug), work, show)


def show(result: dict[str, Any], console: Any) -> None:
    """Print a curve, one budget a line."""
    from rich.table import Column, Table

    from ...eval.report.conversion_tables import curve_rows

    steps = result["fit_steps"]
    how = f"{steps} fit steps a layer" if steps else "closed form"
    name = result.get("donor_name") or result["donor"]
    console.out(f"{name} → {result['method'].upper()}, {how}", highlight=False)
    on = f"{result['measured_tokens']:,} predictions on {result['measured_on']}"
    console.out(f"measured on {on}; donor's perplexity {result['perplexity']:.4g}", highlight=False)
    head, *rows = curve_rows(result)
    table = Table(*(Column(title, justify="right") for title in head))
    for row in rows:
        table.add_row(*row)
    console.print(table)
    for file in result.get("files", ()):
        console.out(file, highlight=False)
