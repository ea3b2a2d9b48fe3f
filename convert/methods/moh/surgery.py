"""Which heads a token can do without: closed forms for routers, from what each head adds. Pure; float64.

N tokens, U routing units (heads or groups of them), D hidden_size. The energy of a unit at a token is ‖Σ o_h W_O^h‖²
over its heads: what leaving it out changes in the attention's output.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

RIDGE = 1e-3  # of the inputs' mean energy
TINY = 1e-30  # an energy below it counts as this


@dataclass
class RoutingStatistics:
    """Sums over tokens of the attention input x, the logarithms e of the units' energies, and l of their query norms.

    moment (D + 1, D + 1) of [x; 1]; cross (D + 1, U) of [x; 1] and e; norms (3, U): l, l², l · e; count: of tokens.
    """

    moment: Tensor
    cross: Tensor
    norms: Tensor
    count: int = 0

    @staticmethod
    def empty(width: int, units: int) -> RoutingStatistics:
        """Of no token."""
        zeros = torch.zeros(width + 1, width + 1 + units, dtype=torch.float64)
        moment, cross = zeros.split((width + 1, units), dim=1)
        return RoutingStatistics(moment.clone(), cross.clone(), torch.zeros(3, units, dtype=torch.float64))

    def add(self, x: Tensor, energies: Tensor, squared_norms: Tensor) -> None:
        """x (N, D), energies (N, U), squared query norms (N, U), of any dtype and device."""
        whole = torch.cat((x.float(), x.new_ones(len(x), 1).float()), dim=1)
        e = energies.double().clamp_min(TINY).log()
        size = squared_norms.double().clamp_min(TINY).log() / 2
        self.moment += (whole.mT @ whole).cpu().double()
        self.cross += (whole.mT @ e.to(whole.dtype)).cpu().double()
        self.norms += torch.stack((size.sum(0), size.square().sum(0), (size * e).sum(0))).cpu()
        self.count += len(x)

    @property
    def mean_log_energies(self) -> Tensor:
        """(U,)"""
        return self.cross[-1] / self.count


def shared_units(statistics: RoutingStatistics, count: int) -> list[int]:
    """The `count` units that add most to the tokens, by the mean logarithm of their energies; ascending."""
    order = statistics.mean_log_energies.sort(descending=True, stable=True).indices
    return sorted(order[:count].tolist())


def linear_scores(statistics: RoutingStatistics, units: list[int]) -> tuple[Tensor, Tensor]:
    """weight (R, D) and bias (R,) of the ridge regression of the units' log energies on x.

    The logarithm makes every token count alike, whatever the size of its attention output, and the differences that
    decide between heads are ratios.
    """
    moment = statistics.moment
    damping = RIDGE * moment.diagonal()[:-1].mean() * torch.eye(len(moment), dtype=moment.dtype)
    damping[-1, -1] = 0  # means are free
    found = torch.linalg.solve(moment + damping, statistics.cross[:, units])
    return found[:-1].mT.contiguous(), found[-1]


def norm_scores(statistics: RoutingStatistics, units: list[int]) -> tuple[list[float], list[float]]:
    """Scale and offset of each unit's log ‖q‖, by regression of its log energy: so no unit wins by the size of W_Q."""
    size, squares, products = (row[units] / statistics.count for row in statistics.norms)
    e = statistics.mean_log_energies[units]
    spread = squares - size.square()
    scale = torch.where(spread > 1e-9, (products - size * e) / spread.clamp_min(1e-9), 0.0)
    return scale.tolist(), (e - scale * size).tolist()
