"""What a plan or a report says of a cache whose share of the donor's depends on the length of a text."""

from __future__ import annotations

from typing import Any

from .units import share, size


def by_length(content: dict[str, Any]) -> list[tuple[str, str]]:
    """(quantity, value) of `windows` and of `states`; empty where a token leaves the same at any length."""
    rows = _windows(content["windows"], has_codes(content)) if content.get("windows") else []
    return rows + (_states(content["states"]) if content.get("states") else [])


def has_codes(content: dict[str, Any]) -> bool:
    """Whether a layer of a report, or of a plan behind a survey, caches codes."""
    return any("kv_code_bytes" in layer for layer in content.get("layers") or ())


def _windows(windows: dict[str, Any], coded: bool) -> list[tuple[str, str]]:
    """(quantity, value) of a plan's `windows`: what is full, in which class, and the share of the cache by length.

    What a survey has yet to choose is missing. coded: whether the cache has codes, whose shares are of 16 bits.
    """
    shares = ", ".join(
        f"{int(length):,}: {share(part)}" for length, part in windows.get("shares", {}).items()
    )
    kinds = {"learnt": "with sinks", "first": "with the first tokens", "none": "without sinks"}
    sinks = kinds[windows["sinks"]]
    beside = " and the first ones" if windows["sinks"] == "first" else ""
    full = windows.get("full_layers", "chosen by a survey")
    return [
        ("full layers", f"{full}; the others see {windows['window']:,} tokens{beside}"),
        *([(f"share of the cache by length{', at 16 bits' * coded}", shares)] if shares else []),
        ("class", f"{windows['class']}, {sinks}"),
    ]


def _states(states: dict[str, Any]) -> list[tuple[str, str]]:
    """(quantity, value) of a plan's `states`: which layers are linear, what their states weigh, and all by length."""
    shares = ", ".join(
        f"{int(length):,}: {size(states['bytes'][length])}, {share(part)}"
        for length, part in states["shares"].items()
    )
    layers = states["linear_layers"]
    which = ", ".join(map(str, layers)) if layers else f"{states['count']}, chosen by a survey"
    return [
        ("linear layers", f"{which} ({states['mixer']})"),
        ("states, whatever the length", size(states["state_bytes"])),
        ("cache by length, and its share of the donor's at 16 bits", shares),
    ]
