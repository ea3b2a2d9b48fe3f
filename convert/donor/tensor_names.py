"""A checkpoint's tensors under the names of transformers' classes, which resolve and fuse them as transformers does.

…experts.0.gate_proj.weight, …experts.0.up_proj.weight  ->  …experts.gate_up_proj (experts, 2 · width, hidden)
layers.0.mlp.up_proj.weight                             ->  model.layers.0.mlp.up_proj.weight
lm_head.weight alone, where it is tied                  ->  model.embed_tokens.weight
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from mhconvert.errors import CheckpointError

from ..storage.safetensors_reader import TensorSource
from .tensor_layout import LM_HEAD, TensorLayout


class TransformersNames:
    """A TensorSource of `source` under the names that transformers gives its tensors; unknown ones keep theirs.

    Attributes:
        stored: `source`.
        places: stored name -> the name of the tensor that it is, or that it is a part of.

    Raises:
        CheckpointError: a tensor of an expert is missing.
    """

    def __init__(self, source: TensorSource, layout: TensorLayout) -> None:
        self.stored, self._model = source, layout.model
        mapping = get_model_conversion_mapping(layout.model)
        self._renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        self._own_names = layout.model.state_dict()
        # name -> {pattern of a converter: stored names}, with the pattern "" where a tensor is stored whole
        self._parts: dict[str, dict[str, list[str]]] = {}
        for stored in source.names():
            name, pattern = self._resolve(stored)
            self._parts.setdefault(name, {}).setdefault(pattern, []).append(stored)
        if (
            layout.config.tie_word_embeddings
            and layout.embedding not in self._parts
            and LM_HEAD in self._parts
        ):
            self._parts[layout.embedding] = self._parts.pop(LM_HEAD)
        self.places: dict[str, str] = {}
        for name, parts in self._parts.items():
            _require_one(name, parts)
            experts = max(map(len, parts.values()))
            for each in parts.values():
                if len(each) != experts:
                    raise CheckpointError(
                        f"{name}: an expert of 0 … {experts - 1} lacks a tensor; download it again"
                    )
                each.sort(key=_numbers)
                self.places |= dict.fromkeys(each, name)

    def names(self) -> list[str]:
        return list(self._parts)

    def shape(self, name: str) -> tuple[int, ...]:
        def unread(stored: str) -> Tensor:
            return torch.empty(self.stored.shape(stored), device="meta")

        try:
            return tuple(self._fused(name, unread).shape)
        except RuntimeError as error:
            raise CheckpointError(f"{name}: its parts do not have one shape; download it again") from error

    def dtype(self, name: str) -> torch.dtype:
        return self.stored.dtype(self._parts_of(name)[0])

    def nbytes(self, name: str) -> int:
        return sum(map(self.stored.nbytes, self._parts_of(name)))

    def read(self, name: str) -> Tensor:
        return self._fused(name, self.stored.read)

    def read_ahead(self, name: str) -> None:
        for stored in self._parts_of(name):
            self.stored.read_ahead(stored)

    def _resolve(self, stored: str) -> tuple[str, str]:
        """(name, pattern of its converter or "") of a stored tensor, in transformers' own order of attempts."""
        prefix, own = self._model.base_model_prefix, self._own_names
        for renamings, converters in ((self._renamings, self._converters), ([], [])):
            name, pattern = rename_source_key(stored, renamings, converters, prefix, own)
            if name in own:
                return name, pattern or ""
        return stored, ""

    def _fused(self, name: str, read: Callable[[str], Tensor]) -> Tensor:
        """The tensor `name` of what `read` gives for each of its stored parts."""
        self._parts_of(name)
        if "" in self._parts[name]:
            return read(self._parts[name][""][0])
        parts: Any = {
            pattern: [read(stored) for stored in each] for pattern, each in self._parts[name].items()
        }
        converter = next(entry for entry in self._converters if set(parts) <= set(entry.source_patterns))
        patterns = {
            "source_patterns": converter.source_patterns,
            "target_patterns": converter.target_patterns,
        }
        for operation in converter.operations:
            parts = operation.convert(
                parts, **patterns, full_layer_name=name, model=self._model, config=self._model.config
            )
        [fused] = parts.values()
        return fused

    def _parts_of(self, name: str) -> list[str]:
        """The stored tensors that make up `name`."""
        if name not in self._parts:
            raise CheckpointError(f"tensor {name} is not in the checkpoint")
        return [stored for each in self._parts[name].values() for stored in each]


def _require_one(name: str, parts: dict[str, list[str]]) -> None:
    """Raises CheckpointError where a tensor is stored whole more than once, or whole and in parts."""
    whole = parts.get("", [])
    if len(whole) > 1 or (whole and len(parts) > 1):
        stored = ", ".join(stored for each in parts.values() for stored in each)
        raise CheckpointError(f"the tensor {name} is stored more than once: {stored}; remove all but one")


def _numbers(name: str) -> list[int]:
    """The numbers in a name, by which experts are ordered."""
    return [int(number) for number in re.findall(r"\d+", name)]
