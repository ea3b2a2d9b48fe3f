"""The weights of a GGUF file under transformers' names, dequantised one tensor at a time."""

from __future__ import annotations

import math
from typing import Any

import torch
from gguf import MODEL_ARCH_NAMES, get_tensor_name_map
from torch import Tensor

from mhconvert.errors import CheckpointError

from ..storage.safetensors_reader import read_ahead, require_finite
from .gguf_architectures import Architecture
from .gguf_config import architecture_of, gguf_config
from .gguf_entries import GGUFTensor
from .gguf_reader import GGUFHeader, dequantise
from .gguf_rope import ROPE_TENSORS
from .tensor_layout import meta_model

# A tensor of transformers that a file has in two: its module -> theirs, joined along the rows of each expert.
FUSED = {".experts.gate_up_proj": (".experts.gate_proj", ".experts.up_proj")}


class GGUFSource:
    """A TensorSource of the weights of a GGUF file, in float32 and in transformers' row order.

    Raises:
        CheckpointError: the metadata lacks a value that the config needs.
        UnsupportedError: the file's architecture, quantisation or RoPE scaling cannot be read.
    """

    def __init__(self, header: GGUFHeader, config: Any = None) -> None:
        self.header = header
        self._config = gguf_config(header) if config is None else config
        self._architecture = architecture_of(header)
        self._shapes = {name: tuple(w.shape) for name, w in meta_model(self._config).state_dict().items()}
        stored = {name: entry for name, entry in header.tensors.items() if name not in ROPE_TENSORS}
        known = _stored_names(self._architecture, self._config.num_hidden_layers, list(self._shapes))
        self._pieces = {
            name: [stored.pop(part) for part in parts]
            for name, parts in known.items()
            if all(part in stored for part in parts)
        }
        # What no module has a place for keeps its name, and `TensorLayout` says so.
        self._pieces |= {name: [entry] for name, entry in stored.items()}

    def names(self) -> list[str]:
        return list(self._pieces)

    def shape(self, name: str) -> tuple[int, ...]:
        first, *more = self._stored(name)
        if more:
            experts, rows, *rest = first.shape
            return (experts, rows + sum(piece.shape[1] for piece in more), *rest)
        expected = self._shapes.get(name, first.shape)
        # llama.cpp drops axes of length 1 (of the gate of a shared expert).
        return expected if _long_axes(expected) == _long_axes(first.shape) else first.shape

    def dtype(self, name: str) -> torch.dtype:
        return torch.float32

    def nbytes(self, name: str) -> int:
        return 4 * math.prod(self.shape(name))

    def read(self, name: str) -> Tensor:
        pieces = [dequantise(piece) for piece in self._stored(name)]
        tensor = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)
        require_finite(tensor, name, self._stored(name)[0].file)
        if name.endswith("norm.weight"):
            tensor -= self._architecture.norm_offset
        tensor = tensor.view(self.shape(name))
        if self._architecture.interleaved:
            if ".q_proj." in name:
                return _half_split(tensor, self._config.num_attention_heads)
            if ".k_proj." in name:
                return _half_split(tensor, self._config.num_key_value_heads)
        return tensor

    def read_ahead(self, name: str) -> None:
        for piece in self._stored(name):
            read_ahead(piece.file, piece.offset, piece.nbytes)

    def _stored(self, name: str) -> list[GGUFTensor]:
        if name not in self._pieces:
            raise CheckpointError(f"tensor {name} is not in {self.header.path}")
        return self._pieces[name]


def _long_axes(shape: tuple[int, ...]) -> list[int]:
    return [length for length in shape if length != 1]


def _stored_names(architecture: Architecture, layers: int, names: list[str]) -> dict[str, list[str]]:
    """Tensor in transformers -> its tensors in the file, for all that gguf's own map knows."""
    arch = next(key for key, name in MODEL_ARCH_NAMES.items() if name == architecture.name)
    known = get_tensor_name_map(arch, layers)
    stored = {}
    for name in names:
        module, suffix = name, ".weight"  # of a fused parameter, which has no suffix in transformers
        if name.endswith((".weight", ".bias")):
            module, _, end = name.rpartition(".")
            suffix = f".{end}"
        for ours, theirs in architecture.renamed.items():
            module = module.replace(ours, theirs)
        fused = next((end for end in FUSED if module.endswith(end)), None)
        modules = [module.removesuffix(fused) + part for part in FUSED[fused]] if fused else [module]
        found = [known.get_name(each) for each in modules]
        if None not in found:
            stored[name] = [f"{each}{suffix}" for each in found]
    return stored


def _half_split(weight: Tensor, heads: int) -> Tensor:
    """The rows of each head in transformers' order (r0 r1 … i0 i1 …), from llama.cpp's (r0 i0 r1 i1 …)."""
    rows = weight.shape[0] // heads // 2
    return weight.view(heads, rows, 2, -1).transpose(1, 2).reshape(weight.shape)
