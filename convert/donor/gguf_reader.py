"""Reader of GGUF files: metadata in one pass, then single tensors, dequantised to float32."""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from torch import Tensor

from mhconvert.errors import CheckpointError, UnsupportedError

from ..storage.regular_file import require_regular
from ..storage.safetensors_reader import read_bytes
from .gguf_entries import EntryReader, GGUFTensor

MAGIC = b"GGUF"
VERSIONS = (2, 3)
ALIGNMENT = 32
BLOCK = 1 << 22  # elements dequantised at a time, which bounds the memory besides the tensor itself
SPLIT_NAME = re.compile(r"(?P<stem>.+)-\d{5}-of-(?P<count>\d{5})\.gguf", re.IGNORECASE)


@dataclass(frozen=True)
class GGUFHeader:
    """The header of a GGUF file.

    Attributes:
        path: of a split file, its first part.
        metadata: key -> Python value; arrays are lists.
        tensors: name in llama.cpp -> entry.
    """

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GGUFTensor]

    @property
    def architecture(self) -> str:
        return str(self.metadata.get("general.architecture"))

    def hyperparameter(self, key: str, default: Any = None) -> Any:
        """A metadata value of the file's architecture: "block_count" is read from `llama.block_count`."""
        return self.metadata.get(f"{self.architecture}.{key}", default)


def split_parts(path: Path) -> list[Path]:
    """The files of the model in `path`, of which it may be any: all parts of a split file, else itself alone."""
    name = SPLIT_NAME.fullmatch(path.name)
    if name is None:
        return [path]
    count = int(name["count"])
    return [
        path.with_name(f"{name['stem']}-{n:05d}-of-{count:05d}{path.suffix}") for n in range(1, count + 1)
    ]


def read_gguf_header(path: Path) -> GGUFHeader:
    """The header of a GGUF file, or of all parts of a split one, of which `path` may be any.

    Raises:
        CheckpointError: it is damaged, truncated or not a GGUF file, or a part is missing.
    """
    given = _read_file(path)
    count = given.metadata.get("split.count", 1)
    if not isinstance(count, int) or count < 0:
        raise CheckpointError(f"{path}: split.count={count} is not a number of parts")
    paths = split_parts(path) if count > 1 else [path]
    if len(paths) != count:
        raise CheckpointError(
            f"{path} is one of {count} parts; name all as published, …-00001-of-{count:05d}.gguf"
        )
    for number, part in enumerate(paths, 1):
        if not part.is_file():
            raise CheckpointError(
                f"part {number} of {count} of {path} is missing: {part.name}; download it too"
            )
    parts = [given if part == path else _read_file(part) for part in paths]
    tensors = {name: tensor for part in parts for name, tensor in part.tensors.items()}
    stated = parts[0].metadata.get("split.tensors.count", sum(len(part.tensors) for part in parts))
    if stated != len(tensors):
        raise CheckpointError(
            f"the parts of {path} hold {len(tensors)} tensors of {stated}; download them again"
        )
    return GGUFHeader(paths[0], parts[0].metadata, tensors)


def _read_file(path: Path) -> GGUFHeader:
    require_regular(path)
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            if stream.read(4) != MAGIC:
                raise CheckpointError(f"{path} is not a GGUF file")
            version, tensor_count, metadata_count = struct.unpack("<IQQ", stream.read(20))
            if version not in VERSIONS:
                raise CheckpointError(f"{path} is GGUF version {version}; 2 and 3 (little-endian) are read")
            reader = EntryReader(stream, size)
            metadata = reader.metadata(metadata_count)
            entries = reader.tensors(tensor_count, path)
            alignment = metadata.get("general.alignment", ALIGNMENT)
            if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
                raise ValueError(f"general.alignment={alignment} is no power of two")
            start = -(-stream.tell() // alignment) * alignment
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except RecursionError as error:
        raise CheckpointError(
            f"{path} is not a valid GGUF file (its metadata is nested too deeply)"
        ) from error
    except (struct.error, ValueError, KeyError, EOFError) as error:
        raise CheckpointError(f"{path} is truncated or not a valid GGUF file ({error})") from error
    tensors = {name: replace(entry, offset=start + entry.offset) for name, entry in entries.items()}
    _require_tiled(list(tensors.values()), start, size, alignment)
    return GGUFHeader(path, metadata, tensors)


def _require_tiled(tensors: list[GGUFTensor], start: int, size: int, alignment: int) -> None:
    """Raises CheckpointError unless the tensors lie behind one another from `start`, apart by their alignment alone.

    size: of the file, which ends with the last of them. llama.cpp reads no other file.
    """
    end, before = start, None
    for tensor in sorted(tensors, key=lambda each: (each.offset, each.nbytes)):
        aligned = -(-end // alignment) * alignment
        if tensor.offset != aligned:
            neighbour = f"tensor {before}" if before else "its header"
            how = "overlaps" if tensor.offset < end else "is not directly behind"
            raise CheckpointError(
                f"tensor {tensor.name} in {tensor.file} {how} {neighbour}: it begins at byte {tensor.offset}, not at "
                f"{aligned}; download it again"
            )
        end, before = tensor.offset + tensor.nbytes, tensor.name
        if end > size:
            raise CheckpointError(
                f"{tensor.file} is truncated: {size} bytes, and tensor {tensor.name} ends at {end}; download it again"
            )
    if tensors and size - end >= alignment:
        raise CheckpointError(f"{tensors[0].file} has {size - end} bytes behind its last tensor, {before}")


def require_dequantisable(header: GGUFHeader) -> None:
    """Raises UnsupportedError if a tensor is stored in a format that `gguf` cannot dequantise."""
    for quantization, name in {t.quantization: t.name for t in header.tensors.values()}.items():
        try:
            _dequantise_blocks(np.zeros(GGML_QUANT_SIZES[quantization][1], dtype=np.uint8), quantization)
        except (NotImplementedError, KeyError) as error:
            raise UnsupportedError(
                f"{header.path} stores {name} as {quantization.name}, which cannot be read; "
                "use an F16, Q8_0 or K-quant file"
            ) from error


def dequantise(tensor: GGUFTensor) -> Tensor:
    """A stored tensor in float32, as `gguf.quants.dequantize` computes it, but block by block to save memory."""
    raw = read_bytes(tensor.file, tensor.offset, tensor.nbytes).numpy()
    values = torch.empty(tensor.shape, dtype=torch.float32)
    flat = values.view(-1).numpy()
    block, size = GGML_QUANT_SIZES[tensor.quantization]
    step = BLOCK // block
    for first in range(0, raw.size // size, step):
        part = _dequantise_blocks(raw[first * size : (first + step) * size], tensor.quantization)
        flat[first * block : first * block + part.size] = part
    return values


def _dequantise_blocks(raw: np.ndarray, quantization: GGMLQuantizationType) -> np.ndarray:
    # `dequantize` does not accept the bytes of F32 and F16.
    if quantization == GGMLQuantizationType.F32:
        return raw.view("<f4")
    if quantization == GGMLQuantizationType.F16:
        return raw.view("<f2").astype(np.float32)
    return dequantize(raw, quantization).reshape(-1)
