"""What can be the name of an output. Imports no torch."""

from __future__ import annotations

from pathlib import Path

from mhconvert.errors import RecipeError


def require_folder_name(output: str | None) -> None:
    """Raises RecipeError for an output that is no folder of its own: an empty name, /, . or .. at the end."""
    if output is None:
        return
    if not output.strip():
        raise RecipeError("output is empty; name a folder, or leave it out")
    if Path(output).name in ("", ".."):
        raise RecipeError(f"output '{output}' cannot be replaced as a whole; name a folder of its own")
