"""A window of recent tokens with the first four, which are moved next to it (StreamingLLM, arXiv 2309.17453)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .rotation import turned

FIRST = 4  # tokens that every query reads
TILE = 256  # queries whose scores are in memory at a time


@dataclass(frozen=True)
class Window:
    """Which keys a query reads: the first ones and the recent ones, `trained` together.

    Attributes:
        inv_freq: (r / 2,), of the model's RoPE.
    """

    trained: int
    inv_freq: Tensor

    def attend(self, query: Tensor, key: Tensor, value: Tensor, first: int, scaling: float) -> Tensor:
        """Outputs (H, T, d), float32, of queries (H, T, d) at positions first …, all at least `trained`.

        key, value (G, S, d) from position 0.
        """
        outputs = []
        for start in range(0, query.shape[1], TILE):
            tile = query[:, start : start + TILE].float()
            positions = torch.arange(tile.shape[1], device=query.device) + first + start
            outputs.append(self._read(tile, key, value, positions, scaling))
        return torch.cat(outputs, dim=1)

    def _read(self, query: Tensor, key: Tensor, value: Tensor, positions: Tensor, scaling: float) -> Tensor:
        left_out = positions - self.trained + 1  # tokens between the first ones and the window
        recent = torch.arange(
            int(positions[0]) - self.trained + FIRST + 1, int(positions[-1]) + 1, device=key.device
        )
        hidden = (recent > positions[:, None]) | (recent <= positions[:, None] - self.trained + FIRST)  # T L
        moved = turned(query, -left_out, self.inv_freq)
        near = products(query, key[:, recent]).masked_fill_(hidden, -torch.inf)
        scores = torch.cat((products(moved, key[:, :FIRST]), near), dim=-1) * scaling
        values = torch.cat((value[:, :FIRST], value[:, recent]), dim=1)
        return products(scores.softmax(-1), values.mT)


def products(rows: Tensor, columns: Tensor) -> Tensor:
    """(H, T, L) of rows (H, T, d) with the columns (G, L, d) of their KV heads."""
    groups = rows.unflatten(0, (len(columns), -1)).flatten(1, 2)
    return (groups @ columns.float().mT).unflatten(1, (-1, rows.shape[1])).flatten(0, 1)
