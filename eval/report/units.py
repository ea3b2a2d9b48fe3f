"""Quantities formatted for people. Every function returns an empty string for None, an unknown value."""

from __future__ import annotations

import math


def number(value: float | None) -> str:
    """The value with four significant digits: 22.75, 0.03121, 1.204e+09."""
    if value is None:
        return ""
    return f"{value:.4g}" if math.isfinite(value) else "not finite"


def share(value: float | None) -> str:
    """A fraction in percent: 0.3125 -> 31.2 %; 0.5 -> 50 %."""
    return "" if value is None else f"{100 * value:.3g} %"


def size(value: float | None) -> str:
    """A number of bytes in units of powers of 1024: 46080 -> 45 KiB."""
    if value is None:
        return ""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024:
            return f"{value:.4g} {unit}"
        value /= 1024
    return f"{value:.4g} TiB"


def count(value: int | None) -> str:
    """An integer with separators of thousands: 1234567 -> 1,234,567."""
    return "" if value is None else f"{value:,}"


def duration(seconds: float | None) -> str:
    """A time in seconds, or in [hours:]minutes:seconds from a minute on: 8.25 -> 8.2 s; 75 -> 1:15; 4000 -> 1:06:40."""
    if seconds is None:
        return ""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
