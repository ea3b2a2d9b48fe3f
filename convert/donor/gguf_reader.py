"""Reader of GGUF files: metadata in one pass, then single tensors, dequantised to float32."""

from __future__ import annotations

import math
import re
import struct
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from torch import Tensor

from mhconvert.errors import CheckpointError, UnsupportedError

from ..storage.safetensors_reader import read_bytes

MAGIC = b"GGUF"
VERSIONS = (2, 3)
ALIGNMENT = 32
# Value type in GGUF -> `struct` code.
SCALAR_TYPES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
UINT32, STRING, ARRAY, UINT64 = 4, 8, 9, 10
BLOCK = 1 << 22  # elements dequantised at a time, which bounds the memory besides the tensor itself
SPLIT_NAME = re.compile(r"(?P<stem>.+)-\d{5}-of-(?P<count>\d{5})\.gguf", re.IGNORECASE)


@dataclass(frozen=True)
class GGUFTensor:
    """The entry of a stored tensor.

    Attributes:
        name: in llama.cpp.
        shape: rows first; the file has it reversed.
        quantization: the format of the values.
        offset: in bytes from the start of `file`.
    """

    name: str
    shape: tuple[int, ...]
    quantization: GGMLQuantizationType
    offset: int
    file: Path

    @property
    def nbytes(self) -> int:
        block, size = GGML_QUANT_SIZES[self.quantization]
        return math.prod(self.shape) * size // block


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
    count = int(given.metadata.get("split.count", 1))
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
    stated = parts[0].metadata.get("split.tensors.count", len(tensors))
    if stated != len(tensors):
        raise CheckpointError(
            f"the parts of {path} hold {len(tensors)} tensors of {stated}; download them again"
        )
    return GGUFHeader(paths[0], parts[0].metadata, tensors)


def _read_file(path: Path) -> GGUFHeader:
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            if stream.read(4) != MAGIC:
                raise CheckpointError(f"{path} is not a GGUF file")
            version, tensor_count, metadata_count = struct.unpack("<IQQ", stream.read(20))
            if version not in VERSIONS:
                raise CheckpointError(f"{path} is GGUF version {version}; 2 and 3 (little-endian) are read")
            reader = _Reader(stream, size)
            metadata = {reader.string(): reader.value(reader.scalar(UINT32)) for _ in range(metadata_count)}
            entries = [reader.tensor(path) for _ in range(tensor_count)]
            alignment = int(metadata.get("general.alignment", ALIGNMENT))
            start = -(-stream.tell() // alignment) * alignment
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except (struct.error, ValueError, KeyError, EOFError, ArithmeticError) as error:
        raise CheckpointError(f"{path} is truncated or not a valid GGUF file ({error})") from error
    tensors = {t.name: replace(t, offset=start + t.offset) for t in entries}
    end = max((t.offset + t.nbytes for t in tensors.values()), default=0)
    if end > size:
        raise CheckpointError(f"{path} is truncated: {size} bytes of {end}; download it again")
    return GGUFHeader(path, metadata, tensors)


class _Reader:
    """Reads a GGUF header value by value; raises EOFError for a length beyond the end of the file."""

    def __init__(self, stream: BinaryIO, size: int) -> None:
        self.stream, self.size = stream, size

    def take(self, count: int) -> bytes:
        if count > self.size or len(data := self.stream.read(count)) < count:
            raise EOFError("the file ends inside its metadata")
        return data

    def scalar(self, value_type: int) -> Any:
        layout = "<" + SCALAR_TYPES[value_type]
        return struct.unpack(layout, self.take(struct.calcsize(layout)))[0]

    def string(self) -> str:
        return self.take(self.scalar(UINT64)).decode("utf-8", errors="replace")

    def value(self, value_type: int) -> Any:
        """A value of this type; arrays become lists."""
        if value_type == STRING:
            return self.string()
        if value_type != ARRAY:
            number = self.scalar(value_type)
            # The shortest decimal that rounds to the 32-bit float: 1e-05, not 9.999999747378752e-06.
            return float(str(np.float32(number))) if SCALAR_TYPES[value_type] == "f" else number
        item, count = self.scalar(UINT32), self.scalar(UINT64)
        if item in (STRING, ARRAY):
            return [self.value(item) for _ in range(count)]
        layout = np.dtype(SCALAR_TYPES[item]).newbyteorder("<")
        return np.frombuffer(self.take(count * layout.itemsize), dtype=layout).tolist()

    def tensor(self, file: Path) -> GGUFTensor:
        """A tensor's entry, with the offset relative to the start of the tensor data."""
        name = self.string()
        shape = tuple(self.scalar(UINT64) for _ in range(self.scalar(UINT32)))
        quantization = GGMLQuantizationType(self.scalar(UINT32))
        return GGUFTensor(name, shape[::-1], quantization, self.scalar(UINT64), file)


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
