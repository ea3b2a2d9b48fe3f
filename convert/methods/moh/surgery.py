"""Closed forms for routers: which heads a token can do without, from what each head adds to it. Pure; float64.

N tokens, U routing units (heads or groups of them), R routed units, D hidden_size. The energy of a unit at a token is
‖Σ o_h W_O^h‖² over its heads: the squared error of the attention's output when the unit is left out.

Source: MoH, arXiv 2410.11842, which trains its routers; for pretrained models it scores heads by the norms of their
queries and shares the first heads. Different here: scores are fitted to the energies, and the heads that add most are
shared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

RIDGE = 1e-3  # of the inputs' mean energy
TINY = 1e-30  # smaller energies are counted as this one, whose logarithm is finite


@dataclass
class RoutingStatistics:
    """Sums over tokens of the attention input x, of e = log energy and of l = log ‖q‖ of each unit.

    Attributes:
        moment: (D + 1, D + 1), of [x; 1] [x; 1]ᵀ.
        cross: (D + 1, U), of [x; 1] eᵀ.
        norms: (3, U), of l, l² and l · e.
        count: the number of tokens.
    """

    moment: Tensor
    cross: Tensor
    norms: Tensor
    count: int = 0

    @staticmethod
    def empty(width: int, units: int) -> RoutingStatistics:
        """Statistics of no tokens yet."""
        zeros = torch.zeros(width + 1, width + 1 + units, dtype=torch.float64)
        moment, cross = zeros.split((width + 1, units), dim=1)
        return RoutingStatistics(moment.clone(), cross.clone(), torch.zeros(3, units, dtype=torch.float64))

    def add(self, x: Tensor, energies: Tensor, squared_norms: Tensor) -> None:
        """Add N tokens: x (N, D), energies (N, U), squared query norms (N, U), of any dtype and device."""
        whole = torch.cat((x.float(), x.new_ones(len(x), 1).float()), dim=1)
        e = energies.cpu().double().clamp_min(TINY).log()  # not every device has float64
        size = squared_norms.cpu().double().clamp_min(TINY).log() / 2
        self.moment += (whole.mT @ whole).cpu().double()
        self.cross += (whole.mT @ e.to(whole.dtype).to(whole.device)).cpu().double()
        self.norms += torch.stack((size.sum(0), size.square().sum(0), (size * e).sum(0)))
        self.count += len(x)

    @property
    def mean_log_energies(self) -> Tensor:
        """(U,), of each unit over the tokens."""
        return self.cross[-1] / self.count


def shared_units(statistics: RoutingStatistics, count: int, kept: Sequence[int] = ()) -> list[int]:
    """`count` units, ascending: those in `kept`, and those that add most, by the mean logarithm of their energies."""
    order = statistics.mean_log_energies.sort(descending=True, stable=True).indices.tolist()
    return sorted([*kept, *(unit for unit in order if unit not in kept)][:count])


def linear_scores(statistics: RoutingStatistics, units: list[int]) -> tuple[Tensor, Tensor]:
    """Weight (R, D) and bias (R,) of the ridge regression of the log energies of `units` on x.

    With logarithms every token counts alike, whatever the norm of its attention output, and what decides between two
    heads is the ratio of their energies.
    """
    moment = statistics.moment
    damping = RIDGE * moment.diagonal()[:-1].mean() * torch.eye(len(moment), dtype=moment.dtype)
    damping[-1, -1] = 0  # biases are not shrunk
    solution = torch.linalg.solve(moment + damping, statistics.cross[:, units])
    return solution[:-1].mT.contiguous(), solution[-1]


def norm_scores(statistics: RoutingStatistics, units: list[int]) -> tuple[list[float], list[float]]:
    """Scale and offset for log ‖q‖ of each of `units`, by regression of its log energy.

    So a unit is not preferred merely because its W_Q is large.
    """
    size, squares, products = (row[units] / statistics.count for row in statistics.norms)
    e = statistics.mean_log_energies[units]
    spread = squares - size.square()
    scale = torch.where(spread > 1e-9, (products - size * e) / spread.clamp_min(1e-9), 0.0)
    return scale.tolist(), (e - scale * size).tolist()
