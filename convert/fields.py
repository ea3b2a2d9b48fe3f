"""Dataclasses whose fields are choices."""

from __future__ import annotations

import dataclasses
from typing import Any


def changed_fields(choices: Any) -> list[str]:
    """The fields of a dataclass instance whose value is not their default, in order."""
    found = []
    for field in dataclasses.fields(choices):
        made = field.default_factory
        default = field.default if made is dataclasses.MISSING else made()
        if getattr(choices, field.name) != default:
            found.append(field.name)
    return found
