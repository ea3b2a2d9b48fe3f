"""The base of every settings class: a frozen dataclass whose fields are declared with an Option."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from mhconvert.errors import MhconvertError

from .check import check
from .option import declared, settings_in


class Settings:
    """A frozen dataclass derives from this to have its fields checked and converted when an instance is made.

    Args:
        fault: Class attribute: the error that is raised; its message names every field that does not fit.
        instead_of_budget: Class attribute: fields that do not go with kv_budget, and in words what is given by them.
        earlier: Class attribute: fields that records of earlier versions lack, with what was done then.
    """

    fault: ClassVar[type[MhconvertError]] = MhconvertError
    instead_of_budget: ClassVar[dict[str, str]] = {}
    earlier: ClassVar[dict[str, Any]] = {}

    def __post_init__(self) -> None:
        kind: Any = type(self)
        fields = declared(kind)
        values = {
            name: getattr(self, name) for name, field in fields.items() if settings_in(field.hint) is None
        }
        given = {
            name: value
            for name, value in values.items()
            if value is not None or fields[name].default is not None
        }
        taken, faults = check(kind, given, finite=False)
        if faults:
            raise (faults[0].error or self.fault)("; ".join(fault.of_field() for fault in faults))
        for name, value in taken.items():
            self._set(name, value)
        self.check()

    def check(self) -> None:
        """Raise `fault` for fields that do not go together; subclasses override it."""

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)


def json_types(settings: Any) -> dict[str, Any]:
    """Return the settings as plain JSON and YAML types."""
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in dataclasses.asdict(settings).items()
    }
