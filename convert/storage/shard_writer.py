"""Writer of safetensors shards, tensor by tensor and resumable after an interruption."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .atomic_files import write_json
from .safetensors_header import SAFETENSORS_DTYPES
from .safetensors_reader import INDEX, WEIGHTS

DTYPE_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
HEADER_BYTES_A_TENSOR = 256  # reserved for the header of a shard, whose tensors are not known in advance


class ShardWriter:
    """Appends tensors to safetensors shards without holding a shard in memory.

    Space for the header is reserved at the beginning of a shard and filled by `finish`; the format allows trailing
    spaces. So an incomplete shard has no valid header. A writer created from the `state` of an earlier one drops all
    tensors that were appended after that state, and the same tensors then give the same bytes.
    """

    def __init__(self, folder: Path, limit: int, tensors: int, state: dict[str, Any] | None = None):
        """
        Args:
            folder: of the shards.
            limit: bytes of tensors per shard; a larger tensor gets its own shard.
            tensors: the largest number of tensors, which determines the reserved size of the headers.
            state: `state` of the writer of an interrupted run.
        """
        self.folder, self.limit = folder, limit
        self._header_bytes = -(-max(1, tensors) * HEADER_BYTES_A_TENSOR // 4096) * 4096
        self._shards: list[dict[str, Any]] = state["shards"] if state else []
        self._unsynced: set[str] = set()
        for number, shard in enumerate(self._shards, start=1):
            final = folder / self._final_name(number)
            if final.exists():  # the run was interrupted while shards were renamed
                os.replace(final, folder / shard["file"])
            os.truncate(folder / shard["file"], 8 + self._header_bytes + shard["bytes"])
        known = {shard["file"] for shard in self._shards}
        for stray in folder.glob("shard-*.safetensors"):
            if stray.name not in known:
                stray.unlink()

    @property
    def state(self) -> dict[str, Any]:
        """What a new writer needs to continue from here, as a value for JSON."""
        return {"shards": self._shards}

    def add(self, name: str, tensor: Tensor) -> None:
        """Append a tensor, in a new shard if it does not fit into the current one."""
        data = tensor.detach().cpu().contiguous()
        raw = data.view(torch.uint8).reshape(-1) if data.numel() else data.new_empty(0, dtype=torch.uint8)
        if not self._shards or (
            self._shards[-1]["bytes"] and self._shards[-1]["bytes"] + len(raw) > self.limit
        ):
            self._start_shard()
        shard = self._shards[-1]
        begin = shard["bytes"]
        with open(self.folder / shard["file"], "r+b") as file:
            file.seek(8 + self._header_bytes + begin)
            file.write(raw.numpy().data)
        self._unsynced.add(shard["file"])
        shard["bytes"] = begin + len(raw)
        shard["tensors"][name] = {
            "dtype": DTYPE_NAMES[data.dtype],
            "shape": list(data.shape),
            "data_offsets": [begin, shard["bytes"]],
        }

    def flush(self) -> None:
        """Write the added tensors to disk with fsync."""
        for name in sorted(self._unsynced):
            with open(self.folder / name, "r+b") as file:
                os.fsync(file.fileno())
        self._unsynced.clear()

    def finish(self) -> int:
        """Write headers and index, and rename the shards; returns the bytes of all tensors."""
        total = sum(shard["bytes"] for shard in self._shards)
        weight_map: dict[str, str] = {}
        for number, shard in enumerate(self._shards, start=1):
            name = self._final_name(number)
            header = json.dumps({"__metadata__": {"format": "pt"}} | shard["tensors"]).encode()
            assert len(header) <= self._header_bytes, "the header would overwrite tensors"
            with open(self.folder / shard["file"], "r+b") as file:
                file.write(struct.pack("<Q", self._header_bytes) + header.ljust(self._header_bytes))
            os.replace(self.folder / shard["file"], self.folder / name)
            weight_map |= dict.fromkeys(shard["tensors"], name)
        if len(self._shards) > 1:
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            write_json(self.folder / INDEX, index)
        return total

    def _final_name(self, number: int) -> str:
        if len(self._shards) == 1:
            return WEIGHTS
        return f"model-{number:05d}-of-{len(self._shards):05d}.safetensors"

    def _start_shard(self) -> None:
        name = f"shard-{len(self._shards) + 1:05d}.safetensors"
        with open(self.folder / name, "wb") as file:
            file.truncate(8 + self._header_bytes)
        self._shards.append({"file": name, "bytes": 0, "tensors": {}})
