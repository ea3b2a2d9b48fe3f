"""Reader of safetensors checkpoints, one tensor at a time. No file stays open or mapped between reads."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

import torch
from torch import Tensor

from mhconvert.errors import CheckpointError

from .dtype_cast import is_finite
from .regular_file import require_regular
from .safetensors_header import StoredTensor, read_header
from .unicode_text import lone_surrogate

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
FINITE_BLOCK = 1 << 24  # elements checked at a time, which bounds the memory


class TensorSource(Protocol):
    """Tensors that are read on demand by their names, such as `model.layers.0.self_attn.q_proj.weight`."""

    def names(self) -> list[str]:
        """The names of all tensors, in file order."""
        ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def dtype(self, name: str) -> torch.dtype:
        """The dtype that `read` returns."""
        ...

    def nbytes(self, name: str) -> int:
        """The bytes of the tensor that `read` returns."""
        ...

    def read(self, name: str) -> Tensor:
        """The tensor on the CPU, in new memory; raises CheckpointError for NaN or infinite values."""
        ...

    def read_ahead(self, name: str) -> None:
        """Tell the operating system that the tensor is read soon."""
        ...


class SafetensorsSource:
    """A TensorSource of the weights of a model folder: model.safetensors, or shards with their index.

    Raises:
        CheckpointError: there are no safetensors, a shard is missing or truncated, or the index refers to a file
            outside the folder or to a tensor that its shard lacks.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        _require_files(self.folder)
        if (self.folder / WEIGHTS).is_file():
            self._tensors = read_header(self.folder / WEIGHTS)
        elif (self.folder / INDEX).is_file():
            self._tensors = self._from_index(read_weight_map(self.folder))
        else:
            raise CheckpointError(no_weights(self.folder, [file.name for file in self.folder.iterdir()]))

    def names(self) -> list[str]:
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entry(name).shape

    def dtype(self, name: str) -> torch.dtype:
        return self._entry(name).dtype

    def nbytes(self, name: str) -> int:
        return self._entry(name).nbytes

    def read(self, name: str) -> Tensor:
        return read_tensor(name, self._entry(name))

    def read_ahead(self, name: str) -> None:
        entry = self._entry(name)
        read_ahead(entry.file, entry.offset, entry.nbytes)

    def _entry(self, name: str) -> StoredTensor:
        if name not in self._tensors:
            raise CheckpointError(f"tensor {name} is not in {self.folder}")
        return self._tensors[name]

    def _from_index(self, weight_map: dict[str, str]) -> dict[str, StoredTensor]:
        """name -> location of every tensor in the index."""
        shards: dict[str, dict[str, StoredTensor]] = {}
        tensors = {}
        for name, file in weight_map.items():
            if file not in shards:
                if not (self.folder / file).is_file():
                    raise CheckpointError(
                        f"shard {file} named in {self.folder / INDEX} is missing; download the checkpoint again"
                    )
                shards[file] = read_header(self.folder / file)
            if name not in shards[file]:
                raise CheckpointError(
                    f"{self.folder / INDEX} places tensor {name} in {file}, which does not have it"
                )
            tensors[name] = shards[file][name]
        return tensors


def read_weight_map(folder: Path) -> dict[str, str]:
    """tensor name -> its shard, a path relative to `folder`, as the folder's index has it.

    Raises:
        CheckpointError: the index has no weight_map, or names what is not a safetensors file inside the folder.
    """
    index = folder / INDEX
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map; download the checkpoint again")
    for file in map(str, weight_map.values()):
        path = PurePosixPath(file)
        inside = not path.is_absolute() and ".." not in path.parts and "\\" not in file
        if not inside or not file.endswith(".safetensors"):
            raise CheckpointError(
                f"{index} points at '{file}', which is not a safetensors file inside its folder"
            )
    return {name: str(file) for name, file in weight_map.items()}


def weights_present(folder: Path) -> bool:
    """Whether all files of the weights that transformers would read are in `folder`.

    Raises:
        CheckpointError: one of them is a pipe, a device or a folder, or the index is damaged.
    """
    _require_files(folder)
    if (folder / WEIGHTS).is_file():
        return True
    return (folder / INDEX).is_file() and all(
        (folder / file).is_file() for file in set(read_weight_map(folder).values())
    )


def _require_files(folder: Path) -> None:
    for name in (WEIGHTS, INDEX):
        require_regular(folder / name)


def weight_names(folder: Path) -> list[str]:
    """The names of the tensors in `folder`, by its index where there is one. Raises as `SafetensorsSource` does."""
    if (folder / WEIGHTS).is_file():
        return list(read_header(folder / WEIGHTS))
    return list(read_weight_map(folder))


def read_tensor(name: str, entry: StoredTensor) -> Tensor:
    """The tensor in new memory; raises CheckpointError for NaN or infinite values."""
    raw = read_bytes(entry.file, entry.offset, entry.nbytes)
    tensor = raw.view(entry.dtype).reshape(entry.shape)
    require_finite(tensor, name, entry.file)
    return tensor


def read_bytes(file: Path, offset: int, nbytes: int) -> Tensor:
    """`nbytes` bytes of `file` from `offset`, as a new uint8 tensor.

    Raises:
        CheckpointError: the file cannot be read or is too short.
    """
    raw = torch.empty(nbytes, dtype=torch.uint8)
    try:
        with file.open("rb", buffering=0) as stream:
            stream.seek(offset)
            view = raw.numpy().data
            done = 0
            while done < nbytes and (count := stream.readinto(view[done:])):
                done += count
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}") from error
    if done < nbytes:
        raise CheckpointError(f"{file} is truncated: it ends {nbytes - done} bytes early; download it again")
    return raw


def read_ahead(file: Path, offset: int, nbytes: int) -> None:
    """Let the operating system read a part of `file` into its cache meanwhile, where it can do so.

    An error is told by the read itself.
    """
    if hasattr(os, "posix_fadvise"):
        with contextlib.suppress(OSError), file.open("rb", buffering=0) as stream:
            os.posix_fadvise(stream.fileno(), offset, nbytes, os.POSIX_FADV_WILLNEED)


def require_finite(tensor: Tensor, name: str, file: Path) -> None:
    """Raises CheckpointError, with `name` and `file`, if a floating-point tensor has NaN or infinite values."""
    if not tensor.is_floating_point():
        return
    for block in tensor.view(-1).split(FINITE_BLOCK):
        if block.element_size() == 1:
            block = block.float()
        if not is_finite(block):
            kind = "NaN" if torch.isnan(block).any() else "infinite"
            raise CheckpointError(f"tensor {name} in {file} holds {kind} values; the checkpoint is damaged")


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        CheckpointError: the file cannot be read, does not contain an object, or has half of a character escaped.
    """
    require_regular(file)
    try:
        text = file.read_text(encoding="utf-8")
        data = json.loads(text)
        half = lone_surrogate(json.dumps(data, ensure_ascii=False)) if r"\ud" in text.lower() else None
    except RecursionError as error:
        raise CheckpointError(f"{file} cannot be read: its JSON is nested too deeply") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read: {' '.join(str(error).split())}") from error
    if half:
        raise CheckpointError(f"{file} cannot be used: {half.split(' is ', 1)[1]}")
    if not isinstance(data, dict):
        raise CheckpointError(f"{file} does not hold a JSON object")
    return data


def no_weights(place: str | Path, files: list[str]) -> str:
    """The message for a folder or repository `place` with `files`, but without safetensors: the reason and a remedy."""
    pickles = sorted(name for name in files if name.endswith((".bin", ".pt", ".pth")))
    if pickles:
        return (
            f"{place} holds pickled weights only ({pickles[0]}); mhconvert reads safetensors or GGUF: "
            "load it once with transformers where you trust it, and save_pretrained writes safetensors"
        )
    ggufs = sorted(name for name in files if name.lower().endswith(".gguf"))
    if ggufs:
        return f"{place} holds no safetensors; to use its GGUF, give that file itself: {ggufs[0]}"
    return f"{place} holds no weights: neither {WEIGHTS} nor {INDEX}"
