"""The survey's matrices in a file, of which one layer's are in memory at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import overload

from safetensors import safe_open

from ..methods.layer_sensitivity import LayerSensitivity
from ..storage.atomic_files import save_tensors

FIELDS = tuple(field.name for field in dataclasses.fields(LayerSensitivity))


def write_sensitivities(layers: Sequence[LayerSensitivity], path: Path) -> None:
    """Write what a survey found of every layer, atomically."""
    save_tensors({f"{i}.{name}": getattr(one, name) for i, one in enumerate(layers) for name in FIELDS}, path)


class StoredSensitivities(Sequence[LayerSensitivity]):
    """What `write_sensitivities` wrote; each layer is read when it is asked for, and not kept."""

    def __init__(self, path: Path):
        self._path = path
        with safe_open(path, "pt") as file:
            self._layers = len(file.keys()) // len(FIELDS)

    def __len__(self) -> int:
        return self._layers

    @overload
    def __getitem__(self, index: int) -> LayerSensitivity: ...

    @overload
    def __getitem__(self, index: slice) -> list[LayerSensitivity]: ...

    def __getitem__(self, index: int | slice) -> LayerSensitivity | list[LayerSensitivity]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(self._layers))]
        number = range(self._layers)[index]
        with safe_open(self._path, "pt") as file:
            return LayerSensitivity(**{name: file.get_tensor(f"{number}.{name}") for name in FIELDS})
