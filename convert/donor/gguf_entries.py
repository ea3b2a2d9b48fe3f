"""The entries of a GGUF header: metadata and tensors, each count and length of which is within the file."""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

# Value type in GGUF -> `struct` code.
SCALAR_TYPES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
UINT32, STRING, ARRAY, UINT64 = 4, 8, 9, 10
LEAST_ENTRY, LEAST_TENSOR = 13, 32  # bytes: of a key and its value, of the entry of a tensor
LEAST_ITEM = {STRING: 8, ARRAY: 12}  # bytes of one in a list
MAX_AXES = 4


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


class EntryReader:
    """Reads a GGUF header value by value; raises EOFError for a length or a count beyond the end of the file."""

    def __init__(self, stream: BinaryIO, size: int) -> None:
        self.stream, self.size = stream, size

    def require(self, count: int, least: int) -> None:
        """Raises EOFError where `count` things of at least `least` bytes each are more than the rest of the file."""
        if count * least > self.size - self.stream.tell():
            raise EOFError(f"the file ends inside its metadata, which counts {count}")

    def take(self, count: int) -> bytes:
        self.require(count, 1)
        return self.stream.read(count)

    def metadata(self, count: int) -> dict[str, Any]:
        """key -> value of `count` entries."""
        self.require(count, LEAST_ENTRY)
        found: dict[str, Any] = {}
        for _ in range(count):
            key = self.string()
            if key in found:
                raise ValueError(f"{key} is there twice")
            found[key] = self.value(self.scalar(UINT32))
        return found

    def tensors(self, count: int, file: Path) -> dict[str, GGUFTensor]:
        """name -> entry of `count` tensors."""
        self.require(count, LEAST_TENSOR)
        found: dict[str, GGUFTensor] = {}
        for _ in range(count):
            tensor = self.tensor(file)
            if tensor.name in found:
                raise ValueError(f"tensor {tensor.name} is there twice")
            found[tensor.name] = tensor
        return found

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
            self.require(count, LEAST_ITEM[item])
            return [self.value(item) for _ in range(count)]
        layout = np.dtype(SCALAR_TYPES[item]).newbyteorder("<")
        return np.frombuffer(self.take(count * layout.itemsize), dtype=layout).tolist()

    def tensor(self, file: Path) -> GGUFTensor:
        """A tensor's entry, with the offset relative to the start of the tensor data."""
        name, axes = self.string(), self.scalar(UINT32)
        if not 1 <= axes <= MAX_AXES:
            raise ValueError(f"tensor {name} has {axes} axes")
        shape = tuple(self.scalar(UINT64) for _ in range(axes))
        kind = self.scalar(UINT32)
        if kind not in set(GGMLQuantizationType):
            raise ValueError(f"tensor {name} is of type {kind}, which there is not")
        quantization = GGMLQuantizationType(kind)
        block, _ = GGML_QUANT_SIZES[quantization]
        if shape[0] % block:
            raise ValueError(
                f"tensor {name} has rows of {shape[0]}, and {quantization.name} has blocks of {block}"
            )
        return GGUFTensor(name, shape[::-1], quantization, self.scalar(UINT64), file)
