"""Settings from plain values (YAML, JSON): all faults are collected, each with its key and line."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from mhconvert.errors import MhconvertError

from .check import Fault, Keys, check
from .option import Declared, declared, settings_in
from .yaml_file import Origins


@dataclass
class Reading:
    """One reading of plain values as settings; faults are collected until `raise_faults`.

    Args:
        origins: Where the values stand, for messages.
        beside: Keys of the outermost mapping that belong to others; messages name them among those that there are.
        kinds: Settings classes of fields of the outermost mapping whose own type leaves them open.
        faults: The faults met so far: unknown and missing keys, wrong types, numbers out of bounds, and fields that do
            not go together; RecipeErrors where the values come from a file.
    """

    origins: Origins
    beside: Collection[str] = ()
    kinds: dict[str, Any] = field(default_factory=dict)
    faults: list[MhconvertError] = field(default_factory=list)

    def read(self, kind: Any, values: Mapping[str, Any], keys: Keys = ()) -> Any:
        """Return an instance of the settings class `kind` from the mapping at `keys`, or None where it has faults."""
        before, fields = len(self.faults), declared(kind)
        self.faults += self._misnamed(kind, values, keys)
        given = {
            name: value
            for name, value in values.items()
            if name in fields and not (value is None and fields[name].default is None)
        }
        plain = {name: value for name, value in given.items() if self._kind(fields[name], keys) is None}
        taken, faults = check(kind, plain, finite=True)
        self.faults += [self._located(kind, fault, keys) for fault in faults]
        for name in [name for name in given if name not in plain]:  # in the order of the file
            taken[name] = self.inner(self._kind(fields[name], keys), given[name], (*keys, name))
        if len(self.faults) > before:
            return None
        try:
            return kind(**taken)
        except MhconvertError as error:
            self.faults.append(self.origins.blame(error, keys, values))
            return None

    def raise_faults(self) -> None:
        """Raise the first fault with the messages of the others appended."""
        if self.faults:
            first, *others = self.faults
            raise type(first)("; ".join(map(str, [first, *others]))) from first.__cause__

    def _kind(self, field: Declared, keys: Keys) -> Any:
        return (self.kinds.get(field.name) if not keys else None) or settings_in(field.hint)

    def inner(self, kind: Any, value: Any, keys: Keys) -> Any:
        """Return the settings that stand at `keys`, which may be an instance already, or several in a tuple."""
        if isinstance(value, kind) or (
            isinstance(value, tuple) and all(isinstance(one, kind) for one in value)
        ):
            return value
        if isinstance(value, dict):
            return self.read(kind, value, keys)
        fault = Fault(keys[-1], (), value, "a mapping of settings")
        self.faults.append(self.origins.fault(keys, fault.at(keys[:-1])))
        return None

    def _misnamed(self, kind: Any, values: Mapping[str, Any], keys: Keys) -> Iterator[MhconvertError]:
        fields, place = declared(kind), ".".join(keys) or "recipe"
        for name in values:
            if name not in fields:
                what = f"{place} has no key '{name}'; {self._instead(str(name), fields, keys)}"
                yield self.origins.fault((*keys, str(name)), what)
        for name, known in fields.items():
            if known.required and name not in values:
                yield self.origins.fault(keys, f"{place}: the key '{name}' is missing")

    def _instead(self, name: str, fields: Mapping[str, Declared], keys: Keys) -> str:
        """Return which keys `name` may have meant (also one level deeper), and which keys exist."""
        known = sorted({*fields, *(self.beside if not keys else ())})
        inner = {outer: self._kind(field, keys) for outer, field in fields.items()}
        deeper = [
            f"{outer}.{name}" for outer, kind in inner.items() if kind is not None and name in declared(kind)
        ]
        near = deeper or difflib.get_close_matches(name, known, n=2, cutoff=0.6)
        has = f"it has {', '.join(known)}"
        return f"did you mean {' or '.join(near)}? ({has})" if near else has

    def _located(self, kind: Any, fault: Fault, keys: Keys) -> MhconvertError:
        if fault.message is not None and not self.origins.places:
            return (fault.error or kind.fault)(fault.at(keys))  # type: ignore[no-any-return]
        return self.origins.fault((*keys, fault.field, *fault.inner), fault.at(keys))
