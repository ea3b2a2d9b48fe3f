"""`mhconvert donors`: the aliases that DONOR may be, and the hub ids behind them."""

from __future__ import annotations

from typing import Any, TextIO

from mhconvert.cli import options as o
from mhconvert.cli.output import Flags, execute


def command(json: o.Json = False, quiet: o.Quiet = False, debug: o.Debug = False) -> None:
    """List the aliases of well-known donors with their hub ids."""

    def work(_: TextIO) -> dict[str, Any]:
        from mhconvert.convert.aliases import ALIASES

        return {"donors": dict(ALIASES)}

    execute(Flags(json, quiet, debug), work, show)


def show(result: dict[str, Any], console: Any) -> None:
    """Print alias and hub id, one donor a line."""
    width = max(map(len, result["donors"]))
    for alias, hub_id in result["donors"].items():
        console.out(f"{alias:<{width}}  {hub_id}", highlight=False)
