"""Reads the layers of a user's plan from a file; imports no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mhconvert.errors import BudgetError


def read_layers(plan: Any) -> Any:
    """The layers in a plan file: {"layers": […]}; what is no path comes back as it is. Raises BudgetError."""
    if not isinstance(plan, (str, Path)):
        return plan
    try:
        return json.loads(Path(plan).read_text(encoding="utf-8"))["layers"]
    except OSError as error:
        raise BudgetError(f"plan {plan} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise BudgetError(f'plan {plan} is not JSON with {{"layers": […]}}') from error
