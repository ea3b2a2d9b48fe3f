"""The header of a safetensors file: where its tensors are. Every claim of it is checked before a tensor is read."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import _TYPES

from mhconvert.errors import CheckpointError

from .regular_file import require_regular

HEADER_LIMIT = 100_000_000  # bytes; the limit of the safetensors format

SAFETENSORS_DTYPES = {name: dtype for name, dtype in _TYPES.items() if isinstance(dtype, torch.dtype)}


@dataclass(frozen=True)
class StoredTensor:
    """The location of a tensor: `nbytes` bytes of `file` from `offset`."""

    file: Path
    offset: int
    nbytes: int
    shape: tuple[int, ...]
    dtype: torch.dtype


def read_header(file: Path) -> dict[str, StoredTensor]:
    """name -> location of the tensors in one safetensors file.

    Raises:
        CheckpointError: it is truncated or not a safetensors file.
    """
    require_regular(file)
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            start = stream.read(8)
            length = int.from_bytes(start, "little")
            if start == b"version ":
                raise CheckpointError(f"{file} is a Git LFS pointer, not the weights; run 'git lfs pull'")
            if len(start) < 8 or length > min(HEADER_LIMIT, size - 8):
                raise CheckpointError(f"{file} is truncated or not a safetensors file ({size} bytes)")
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        entries = {name: _stored_tensor(file, entry, 8 + length) for name, entry in header.items()}
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}") from error
    except RecursionError as error:
        raise CheckpointError(f"{file} is not a valid safetensors file (nested too deeply)") from error
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise CheckpointError(f"{file} is not a valid safetensors file ({error})") from error
    end = max((entry.offset + entry.nbytes for entry in entries.values()), default=0)
    if end > size:
        raise CheckpointError(f"{file} is truncated: {size} bytes of {end}; download it again")
    _require_tiled(file)
    return entries


def _require_tiled(file: Path) -> None:
    """Raises CheckpointError where tensors overlap or leave bytes between them or behind them."""
    try:
        # Reads the header alone, and checks all of it. For torch it would reserve memory for the whole file.
        with safe_open(file, framework="np"):
            return
    except SafetensorError as error:
        reason = str(error).removeprefix("Error while deserializing header: ")
        raise CheckpointError(f"{file} is not a valid safetensors file ({reason})") from error


def _stored_tensor(file: Path, entry: dict[str, Any], base: int) -> StoredTensor:
    """The location of a tensor from its entry in the header; `base` is the offset of the tensor data in the file."""
    begin, end = entry["data_offsets"]
    shape = tuple(int(n) for n in entry["shape"])
    if entry["dtype"] not in SAFETENSORS_DTYPES:
        raise ValueError(f"dtype {entry['dtype']} is unknown")
    dtype = SAFETENSORS_DTYPES[entry["dtype"]]
    if begin < 0 or min(shape, default=0) < 0 or end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"offsets {begin}:{end} do not fit shape {list(shape)}")
    return StoredTensor(file, base + begin, end - begin, shape, dtype)
