"""Reads the layers of a user's plan, from a file or as they are; imports no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mhconvert.errors import BudgetError

from ..storage.regular_file import require_regular


def read_layers(plan: Any, example: str, kind: str = "plan") -> list[dict[str, Any]]:
    """The layers of a plan: of a file with {"layers": […]}, or of a list; `kind` is what errors call it.

    Raises:
        BudgetError: the file cannot be read, or the layers are no list of mappings such as `example`.
    """
    layers = _of_file(plan, kind) if isinstance(plan, (str, Path)) else plan
    if not isinstance(layers, (list, tuple)) or not all(isinstance(layer, dict) for layer in layers):
        raise BudgetError(
            f"{name_of(plan, kind)} is no list of layers such as {example}, and no file with one"
        )
    return list(layers)


def name_of(plan: Any, kind: str = "plan") -> str:
    """A plan as errors name it: by its file, if it has one."""
    return f"{kind} {plan}" if isinstance(plan, (str, Path)) else kind


def _of_file(path: str | Path, kind: str) -> Any:
    require_regular(Path(path), BudgetError)
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))["layers"]
    except OSError as error:
        raise BudgetError(f"{kind} {path} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise BudgetError(f'{kind} {path} is not JSON with {{"layers": […]}}') from error
