"""Writing a checkpoint so that a folder which exists is whole, and a run that was cut short can go on."""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from mhconvert.convert.errors import OutputError

INDEX = "model.safetensors.index.json"
STATE = "state.json"
ADAPTER_CONFIG = "adapter_config.json"
KINDS = ("config.json", ADAPTER_CONFIG)  # one of which every folder that we write holds
UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64"}
HEADER_BYTES_A_TENSOR = 256  # reserved in a shard before its tensors are known


def byte_size(text: str) -> int:
    """ "5GB" -> 5 000 000 000. Raises OutputError for what is no size."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]?I?B?)\s*", text.upper())
    size = int(float(match[1]) * UNITS.get(match[2], 0)) if match else 0
    if not size:
        raise OutputError(f"max_shard_size '{text}' is not a size such as 5GB or 500MB")
    return size


class ShardWriter:
    """Appends tensors to safetensors shards without holding a shard in memory.

    The header's room is reserved and filled in when a shard is full (the format allows trailing spaces), so a
    shard has no valid header before it is whole. `state` after a layer, given to a new writer, undoes whatever
    was appended since: the same tensors then give the same bytes.
    """

    def __init__(self, folder: Path, limit: int, tensors: int, state: dict[str, Any] | None = None):
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
            return "model.safetensors"
        return f"model-{number:05d}-of-{len(self._shards):05d}.safetensors"

    def _start(self) -> None:
        name = f"shard-{len(self._shards) + 1:05d}.safetensors"
        with open(self.folder / name, "wb") as file:
            file.truncate(8 + self._room)
        self._shards.append({"file": name, "bytes": 0, "tensors": {}})


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically: the file has its old content or its new one."""
    partial = path.with_name(path.name + ".new")
    partial.write_text(json.dumps(value, indent=1), encoding="utf-8")
    os.replace(partial, path)


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file atomically: it has its old content or its new one."""
    partial = path.with_name(path.name + ".new")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial, metadata)
    os.replace(partial, path)


def check_free(output: Path, force: bool, *read: Path | None) -> None:
    """Raises OutputError when `output` exists and may not be replaced; what holds a folder of `read` never may."""
    if os.path.lexists(output) and not force:
        raise OutputError(f"{output} exists; choose another folder with -o, or replace it with --force")
    if os.path.lexists(output) and not output.is_dir():
        raise OutputError(f"{output} is no folder; choose another name with -o")
    if not output.name or output.name == ".." or output.is_mount():
        raise OutputError(f"'{output}' cannot be replaced as a whole; name a folder of its own with -o")
    if any(folder and folder.resolve().is_relative_to(output.resolve()) for folder in read):
        raise OutputError(
            f"{output} is read by this command, or holds what is; choose another folder with -o"
        )
    held = os.path.lexists(output) and any(output.iterdir())
    if held and not any((output / name).is_file() for name in KINDS):
        raise OutputError(f"{output} is no checkpoint, and --force replaces nothing else; choose another -o")


def is_adapter(folder: Path) -> bool:
    """Whether `folder` holds an adapter, which has a base model elsewhere."""
    return (folder / ADAPTER_CONFIG).is_file()


def check_space(folder: Path, needed: int) -> None:
    """Raises OutputError when the disk that will hold `folder` lacks `needed` bytes."""
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed:
        raise OutputError(
            f"the disk of {place} has {_shown(free)} free and the conversion needs {_shown(needed)}; free some, "
            "or choose another place with -o"
        )


def _shown(size: float) -> str:
    unit = next((unit for unit in ("GB", "MB", "KB") if size >= UNITS[unit]), "B")
    return f"{size / UNITS[unit]:.2f} {unit}"


def replace_folder(partial: Path, output: Path) -> None:
    """Give the finished folder its name; an old folder of that name goes away only then."""
    if not os.path.lexists(output):
        os.replace(partial, output)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{output.name}.old-", dir=output.parent))
    os.replace(output, old / output.name)
    os.replace(partial, output)
    shutil.rmtree(old, ignore_errors=True)
