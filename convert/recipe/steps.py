"""The steps of a chain: methods of which each converts what the one before it made; an adapter may come last."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from mhconvert.errors import MhconvertError, UnsupportedError

from ..methods import combinations
from ..methods.registry import ADAPTERS, METHOD_NAMES, settings_class
from ..validation.from_values import Reading
from ..validation.option import Option
from ..validation.settings import Settings


@dataclass(frozen=True)
class Step(Settings):
    """One method of a chain, with its settings."""

    method: Annotated[str, Option("The step's method.", "METHOD", flag="")]
    settings: Annotated[Any, Option("What the method lets one choose.", flag="")] = None

    def check(self) -> None:
        """Raise MhconvertError for a method that there is not."""
        if self.method not in METHOD_NAMES:
            raise MhconvertError(unknown(self.method))
        if self.settings is None:
            self._set("settings", settings_class(self.method)())


def choose() -> str:
    """Which methods there are, as it ends a message."""
    return f"choose one of {', '.join(METHOD_NAMES)}"


def unknown(method: object) -> str:
    """The message about a method that there is not."""
    names = methods_of(str(method))
    chain = set(names) <= METHOD_NAMES
    hint = f"methods: has the steps {' and '.join(names)}" if chain else choose()
    return f"unknown method '{method}'; {hint}"


def methods_of(chain: str) -> tuple[str, ...]:
    """("dha", "moh") from "dha+moh"; a method's own name may have a plus in it: the longest names that there are."""
    words, found = chain.split("+"), []
    while words:
        lengths = range(len(words), 0, -1)
        known = next((count for count in lengths if "+".join(words[:count]) in METHOD_NAMES), 1)
        found.append("+".join(words[:known]))
        words = words[known:]
    return tuple(found)


def require_chain(steps: Sequence[Step]) -> None:
    """Raise UnsupportedError for steps of which one cannot follow another, by the table of combinations."""
    if len(steps) == 1:
        raise MhconvertError("methods has one step; give it as method and settings")
    kinds = [_kind(step) for step in steps]
    for number, then in enumerate(kinds):
        reason = combinations.refusal(kinds[:number], then)
        if reason is not None:
            raise UnsupportedError(f"methods {' and then '.join(step.method for step in steps)}: {reason}")


def settled(steps: Sequence[Step]) -> tuple[Step, ...]:
    """The steps; of one that leaves it open whether its cache has codes, it has none where a later one takes none."""
    return tuple(
        dataclasses.replace(step, settings=step.settings.with_elements())
        if _kind(step) == combinations.CODED and taking_no_codes(steps[number:])
        else step
        for number, step in enumerate(steps, 1)
    )


def taking_no_codes(steps: Sequence[Step]) -> str | None:
    """The first method of `steps` that may follow latents only where they have elements of 16 bits; None: no one."""
    return next((step.method for step in steps if combinations.takes_no_codes(_kind(step))), None)


def _kind(step: Step) -> str:
    return combinations.kind(step.method, step.settings)


def converting(steps: Sequence[Step]) -> tuple[Step, ...]:
    """The steps that rewrite layers: all but an adapter."""
    return tuple(step for step in steps if step.method not in ADAPTERS)


def read_steps(values: dict[str, Any], reading: Reading) -> dict[str, Any]:
    """The values of a recipe with its methods as steps; what is wrong with them goes to the faults of `reading`."""
    given, fault = values["methods"], reading.origins.fault
    for name in ("method", "settings"):
        if values.get(name) is not None:
            what = f"{name} and methods exclude each other; methods has the settings of each step"
            reading.faults.append(fault((name,), what))
    if not isinstance(given, (list, tuple)) or not given:
        what = "methods is not a list of steps such as [{method: dha}, {method: moh}]"
        reading.faults.append(fault(("methods",), what))
        return {}
    steps = tuple(_read_step(entry, ("methods", str(index)), reading) for index, entry in enumerate(given))
    return {name: value for name, value in values.items() if name not in ("method", "settings")} | {
        "methods": steps
    }


def _read_step(entry: Any, keys: tuple[str, ...], reading: Reading) -> Any:
    """The step that one entry describes; None where it is faulty."""
    if not isinstance(entry, dict):
        return reading.inner(Step, entry, keys)
    method = entry.get("method")
    if method not in tuple(METHOD_NAMES):
        what = unknown(method) if method is not None else f"the method is missing; {choose()}"
        reading.faults.append(reading.origins.fault((*keys, "method"), f"{'.'.join(keys)}: {what}"))
        return None
    if entry.get("settings") is not None:
        kind = settings_class(str(method))
        entry = entry | {"settings": reading.inner(kind, entry["settings"], (*keys, "settings"))}
    return reading.inner(Step, entry, keys)
