"""Writes the safetensors shards of a checkpoint tensor by tensor, so that an interrupted run can continue."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .atomic_files import write_json
from .safetensors_reader import INDEX, SAFETENSORS_DTYPES, WEIGHTS

DTYPE_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
HEADER_BYTES_A_TENSOR = 256  # reserved in a shard before its tensors are known


class ShardWriter:
    """Appends tensors to safetensors shards without holding a shard in memory.

    Space for the header is reserved at a shard's beginning and filled by `finish` (the format allows trailing spaces),
    so a shard has no valid header before it is complete. A new writer that is given the `state` of an earlier one drops
    whatever was appended after it: the same tensors then give the same bytes.
    """

    def __init__(self, folder: Path, limit: int, tensors: int, state: dict[str, Any] | None = None):
        """
        Args:
            folder: where the shards are written.
            limit: bytes of a shard's tensors; a larger single tensor gets a shard of its own.
            tensors: how many will be written at most, which decides the size of the headers.
            state: `state` of the writer of an interrupted run.
        """
        self.folder, self.limit = folder, limit
        self._room = -(-max(1, tensors) * HEADER_BYTES_A_TENSOR // 4096) * 4096
        self._shards: list[dict[str, Any]] = state["shards"] if state else []
        self._unsynced: set[str] = set()
        for number, shard in enumerate(self._shards, start=1):
            final = folder / self._final_name(number)
            if final.exists():  # cut short while the shards were being named
                os.replace(final, folder / shard["file"])
            os.truncate(folder / shard["file"], 8 + self._room + shard["bytes"])
        known = {shard["file"] for shard in self._shards}
        for stray in folder.glob("shard-*.safetensors"):
            if stray.name not in known:
                stray.unlink()

    @property
    def state(self) -> dict[str, Any]:
        """JSON-ready; everything that a writer needs to go on from here."""
        return {"shards": self._shards}

    def add(self, name: str, tensor: Tensor) -> None:
        """Append one tensor, in a new shard if it does not fit the current one."""
        data = tensor.detach().cpu().contiguous()
        raw = data.view(torch.uint8).reshape(-1) if data.numel() else data.new_empty(0, dtype=torch.uint8)
        if not self._shards or (
            self._shards[-1]["bytes"] and self._shards[-1]["bytes"] + len(raw) > self.limit
        ):
            self._start()
        shard = self._shards[-1]
        begin = shard["bytes"]
        with open(self.folder / shard["file"], "r+b") as file:
            file.seek(8 + self._room + begin)
            file.write(raw.numpy().data)
        self._unsynced.add(shard["file"])
        shard["bytes"] = begin + len(raw)
        shard["tensors"][name] = {
            "dtype": DTYPE_NAMES[data.dtype],
            "shape": list(data.shape),
            "data_offsets": [begin, shard["bytes"]],
        }

    def flush(self) -> None:
        """Make what was added durable."""
        for name in sorted(self._unsynced):
            with open(self.folder / name, "r+b") as file:
                os.fsync(file.fileno())
        self._unsynced.clear()

    def finish(self) -> int:
        """Write the headers and the index and give the shards their names; returns the bytes of all tensors."""
        total = sum(shard["bytes"] for shard in self._shards)
        where: dict[str, str] = {}
        for number, shard in enumerate(self._shards, start=1):
            name = self._final_name(number)
            header = json.dumps({"__metadata__": {"format": "pt"}} | shard["tensors"]).encode()
            assert len(header) <= self._room, "a header longer than its room would run into the tensors"
            with open(self.folder / shard["file"], "r+b") as file:
                file.write(struct.pack("<Q", self._room) + header.ljust(self._room))
            os.replace(self.folder / shard["file"], self.folder / name)
            where |= dict.fromkeys(shard["tensors"], name)
        if len(self._shards) > 1:
            index = {"metadata": {"total_size": total}, "weight_map": where}
            write_json(self.folder / INDEX, index)
        return total

    def _final_name(self, number: int) -> str:
        if len(self._shards) == 1:
            return WEIGHTS
        return f"model-{number:05d}-of-{len(self._shards):05d}.safetensors"

    def _start(self) -> None:
        name = f"shard-{len(self._shards) + 1:05d}.safetensors"
        with open(self.folder / name, "wb") as file:
            file.truncate(8 + self._room)
        self._shards.append({"file": name, "bytes": 0, "tensors": {}})
