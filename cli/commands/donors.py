"""`mhconvert donors`: the aliases of donors and their Hub ids; `--families`: which families can be converted."""

from __future__ import annotations

from typing import Annotated, Any, TextIO

import typer

from ..options import common
from ..output import Flags, execute

Families = Annotated[
    bool, typer.Option("--families", help="The table of model families and methods instead, as Markdown.")
]


def command(
    families: Families = False,
    json: common.Json = False,
    quiet: common.Quiet = False,
    debug: common.Debug = False,
) -> None:
    """List the aliases of well-known donors with their hub ids."""

    def work(_: TextIO) -> dict[str, Any]:
        if families:
            from ...convert.methods.family_table import family_table

            return {"families": family_table()}
        from ...convert.donor.aliases import ALIASES

        return {"donors": dict(ALIASES)}

    execute(Flags(json, quiet, debug), work, show)


def show(result: dict[str, Any], console: Any) -> None:
    """Print alias and hub id, one donor a line; or the table of families."""
    if "families" in result:
        from ...convert.methods.family_table import markdown

        console.out(markdown(result["families"]), highlight=False)
        return
    width = max(map(len, result["donors"]))
    for alias, hub_id in result["donors"].items():
        console.out(f"{alias:<{width}}  {hub_id}", highlight=False)
