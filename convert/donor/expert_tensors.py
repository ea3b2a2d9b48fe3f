"""Mixtures of experts that are published with one tensor per expert, as the fused tensors of transformers' classes.

…experts.0.w1.weight (gate), …experts.0.w3.weight (up)  ->  …experts.gate_up_proj (experts, 2 · width, hidden)
…experts.0.w2.weight (down)                             ->  …experts.down_proj (experts, hidden, width)
"""

from __future__ import annotations

import re

import torch
from torch import Tensor

from mhconvert.errors import CheckpointError

from ..storage.safetensors_reader import TensorSource

EXPERT = re.compile(r"(?P<block>.*\.experts)\.(?P<expert>\d+)\.(?P<part>\w+)\.weight")
PARTS = {  # published name -> (fused tensor, index of its block of rows)
    "w1": ("gate_up_proj", 0),
    "gate_proj": ("gate_up_proj", 0),
    "w3": ("gate_up_proj", 1),
    "up_proj": ("gate_up_proj", 1),
    "w2": ("down_proj", 0),
    "down_proj": ("down_proj", 0),
}
RENAMED = {  # model type -> pairs of (part of the published name, its replacement)
    "mixtral": ((".block_sparse_moe.", ".mlp."),),
    "granitemoe": (
        (".block_sparse_moe.input_linear.weight", ".block_sparse_moe.experts.gate_up_proj"),
        (".block_sparse_moe.output_linear.weight", ".block_sparse_moe.experts.down_proj"),
        (".block_sparse_moe.router.layer.weight", ".block_sparse_moe.router.weight"),
    ),
}


def by_transformers_names(source: TensorSource, model_type: str) -> TensorSource:
    """`source` under transformers' names: itself if it has them already, else a view that renames and fuses.

    Raises:
        CheckpointError: a tensor of an expert is missing.
    """
    fused = _FusedExperts(source, RENAMED.get(model_type, ()))
    return source if fused.names() == source.names() else fused


class _FusedExperts:
    """A TensorSource in which the experts of a layer are stacked along a new first axis."""

    def __init__(self, source: TensorSource, renamed: tuple[tuple[str, str], ...]) -> None:
        self._source = source
        self._stored: dict[str, dict[tuple[int, int], str]] = {}  # name -> {(expert, block): stored name}
        for stored in source.names():
            name, key = stored, (0, 0)
            for published, transformers_name in renamed:
                name = name.replace(published, transformers_name)
            match = EXPERT.fullmatch(name)
            if match and match["part"] in PARTS:
                fused, block = PARTS[match["part"]]
                name, key = f"{match['block']}.{fused}", (int(match["expert"]), block)
            self._stored.setdefault(name, {})[key] = stored
        for name, pieces in self._stored.items():
            experts, blocks = ({key[axis] for key in pieces} for axis in (0, 1))
            if len(pieces) != (max(experts) + 1) * (max(blocks) + 1):
                raise CheckpointError(
                    f"{name}: an expert of 0 … {max(experts)} lacks a tensor; download it again"
                )

    def names(self) -> list[str]:
        return list(self._stored)

    def shape(self, name: str) -> tuple[int, ...]:
        pieces = self._pieces(name)
        rows, *rest = self._source.shape(pieces[0, 0])
        if self._is_single(name):
            return (rows, *rest)
        experts, blocks = (max(key[axis] for key in pieces) + 1 for axis in (0, 1))
        return (experts, blocks * rows, *rest)

    def dtype(self, name: str) -> torch.dtype:
        return self._source.dtype(self._pieces(name)[0, 0])

    def nbytes(self, name: str) -> int:
        return sum(self._source.nbytes(stored) for stored in self._pieces(name).values())

    def read(self, name: str) -> Tensor:
        pieces = self._pieces(name)
        if self._is_single(name):
            return self._source.read(pieces[0, 0])
        experts, rows, *rest = self.shape(name)
        fused = torch.empty(experts, rows, *rest, dtype=self.dtype(name))
        for (expert, block), stored in pieces.items():
            tensor = self._source.read(stored)
            fused[expert, block * len(tensor) : (block + 1) * len(tensor)] = tensor
        return fused

    def _is_single(self, name: str) -> bool:
        """Whether the tensor is stored as it is, perhaps under another name."""
        return EXPERT.fullmatch(next(iter(self._pieces(name).values()))) is None

    def _pieces(self, name: str) -> dict[tuple[int, int], str]:
        """(expert, block) -> stored name, for the tensors that make up `name`."""
        if name not in self._stored:
            raise CheckpointError(f"tensor {name} is not in the checkpoint")
        return self._stored[name]
