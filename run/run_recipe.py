"""`mhconvert.run`: run a recipe, given as a file or as the name of one that ships."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mhconvert.progress import Listener, ignore

from . import shipped_recipes, stages, whole_recipe


def run(
    recipe: str | Path,
    overrides: Sequence[str] = (),
    *,
    only: Sequence[str] = (),
    force: bool = False,
    dry_run: bool = False,
    on_progress: Listener | None = None,
) -> dict[str, Any]:
    """Convert, heal, evaluate, export and push as a recipe says, a file or the name of one that ships.

    overrides: "heal.tokens=1B" and the like, in place of what the file says. only: of its stages these. force: do
    again what an earlier run has done. dry_run: do nothing.
    Returns output (the folder that is evaluated and pushed), stages ({stage, status, output, …} of each) and
    evaluation (as `evaluate` returns it). Raises RecipeError and what the stages raise.
    """

    asked = whole_recipe.load(shipped_recipes.find(str(recipe)), overrides)
    return stages.run(asked, only=only, force=force, dry_run=dry_run, on_progress=on_progress or ignore)
