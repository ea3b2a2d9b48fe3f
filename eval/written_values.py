"""How the lists among an evaluation's options are written. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence

from mhconvert.errors import RecipeError


def task_names(text: str) -> tuple[str, ...]:
    """("piqa", "arc_*") from "piqa,arc_*"; empty names are left out. Raises RecipeError where there is no other."""
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    if not names:
        raise RecipeError(f"tasks '{text}' has no name of a task")
    return names


def token_counts(text: str) -> tuple[int, ...]:
    """(512, 1024) from "512,1024". Raises RecipeError as `require_counts`."""
    try:
        counts = tuple(int(part) for part in text.split(","))
    except ValueError:
        counts = ()
    require_counts(counts, text)
    return counts


def require_counts(counts: Sequence[int], written: object) -> None:
    """Raises RecipeError, which says what is `written`, for anything but different numbers above 0."""
    if not counts or min(counts) < 1 or len(set(counts)) < len(counts):
        raise RecipeError(f"'{written}' is not a list of different numbers of tokens, such as 512,1024")


def needle_depths(text: str) -> tuple[float, ...]:
    """(0.0, 0.5) from "0,0.5". Raises RecipeError as `require_depths`."""
    try:
        depths = tuple(float(part) for part in text.split(","))
    except ValueError:
        depths = ()
    require_depths(depths, text)
    return depths


def require_depths(depths: Sequence[float], written: object) -> None:
    """Raises RecipeError, which says what is `written`, for anything but different numbers from 0 to 1."""
    if not depths or not all(0 <= depth <= 1 for depth in depths) or len(set(depths)) < len(depths):
        raise RecipeError(
            f"'{written}' is not a list of different depths from 0, first, to 1, last, such as 0,0.25,0.9"
        )


def require_needles(lengths: Sequence[int], depths: Sequence[float]) -> None:
    """Raises RecipeError as `require_counts` of the texts' lengths and `require_depths`."""
    require_counts(lengths, list(lengths))
    require_depths(depths, list(depths))


def one_name(text: str) -> tuple[str, ...]:
    """The name alone as a tuple."""
    return (text,)
