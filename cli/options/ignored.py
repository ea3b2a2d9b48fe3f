"""Refuses options that another option, or the lack of one, leaves without any effect."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import typer

from .from_settings import Values


def refuse_ignored(options: Values, names: Collection[str], reason: str) -> None:
    """Raise BadParameter for the first of `names` (parameters) that was given; `reason` follows its flag."""
    for name in names:
        if _given(options.get(name)):
            raise typer.BadParameter(f"--{name.replace('_', '-')} {reason}")


def _given(value: Any) -> bool:
    """Whether a parameter's value comes from the command line; a switch that is off, or an empty list, does not."""
    return value is not None and value is not False and value != []
