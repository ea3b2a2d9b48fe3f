"""What a survey gathers of every layer; in a folder with a file for each layer, one layer's is in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import overload

import torch
from safetensors.torch import load_file

from ..methods.layer_sensitivity import LayerMoments, LayerSensitivity
from ..storage.atomic_files import save_tensors


class MomentFiles:
    """The moments of layers in a folder: read when they are asked for, written when they are set, and not kept."""

    def __init__(self, folder: Path):
        self._folder = folder

    def __len__(self) -> int:
        return len(list(self._folder.glob("*.safetensors")))

    def __getitem__(self, index: int) -> LayerMoments:
        return LayerMoments.of(load_file(self._file(index)))

    def __setitem__(self, index: int, moments: LayerMoments) -> None:
        self._folder.mkdir(exist_ok=True)
        save_tensors(
            {name: torch.as_tensor(value) for name, value in vars(moments).items()}, self._file(index)
        )

    def _file(self, index: int) -> Path:
        return self._folder / f"{index:05d}.safetensors"


def moments_of(layers: int, elements: int, folder: Path | None) -> list[LayerMoments] | MomentFiles:
    """Those of so many layers, of which nothing was counted yet, in a new `folder`; None: in memory."""
    if folder is None:
        return [LayerMoments(elements) for _ in range(layers)]
    files = MomentFiles(folder)
    for index in range(layers):
        files[index] = LayerMoments(elements)
    return files


class Sensitivities(Sequence[LayerSensitivity]):
    """What the moments of every layer say, in memory or in files."""

    def __init__(self, moments: list[LayerMoments] | MomentFiles):
        self.moments = moments

    def __len__(self) -> int:
        return len(self.moments)

    @overload
    def __getitem__(self, index: int) -> LayerSensitivity: ...

    @overload
    def __getitem__(self, index: slice) -> list[LayerSensitivity]: ...

    def __getitem__(self, index: int | slice) -> LayerSensitivity | list[LayerSensitivity]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        return self.moments[range(len(self))[index]].sensitivity()

    def set_costs(self, costs: Iterator[float]) -> None:
        """Add what the method's other kind of layer costs, by layer."""
        for index, cost in enumerate(costs):
            moments = self.moments[index]
            moments.replaced_cost.fill_(cost)
            self.moments[index] = moments
