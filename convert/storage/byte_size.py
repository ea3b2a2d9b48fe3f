"""Sizes in bytes and their notation, such as "5GB". The module does not import torch."""

from __future__ import annotations

import re

from mhconvert.errors import OutputError

DEFAULT_SHARD_SIZE = "5GB"  # of one safetensors file
SLACK_BYTES = (
    32 << 20
)  # estimate for the files of a checkpoint besides its tensors: tokenizer, report, headers
UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def byte_size(text: str) -> int:
    """The number of bytes: "5GB" -> 5 000 000 000.

    Raises:
        OutputError: `text` is not a size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]?I?B?)\s*", text.upper())
    size = int(float(match[1]) * UNITS.get(match[2], 0)) if match else 0
    if not size:
        raise OutputError(f"max_shard_size '{text}' is not a size such as 5GB or 500MB")
    return size


def shown_size(size: float) -> str:
    """The size with its unit: 5 000 000 000 -> "5.00 GB"."""
    unit = next((unit for unit in ("GB", "MB", "KB") if size >= UNITS[unit]), "B")
    return f"{size / UNITS[unit]:.2f} {unit}"
