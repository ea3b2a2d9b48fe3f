"""The choice of linear layers: brute force on small models, and which way it goes."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from mhconvert.convert.methods.hybrid_mla.linear_choice import choose, with_linear
from mhconvert.convert.methods.mla.bit_allocation import width_counts
from mhconvert.convert.methods.mla.latent_code import row_bytes


def layers(seed: int, number: int, cheap: float) -> tuple[list[Tensor], list[float | None]]:
    """Spectra of layers, and costs of being linear that are about `cheap` of what all codes cost; ends are kept."""
    generator = torch.Generator().manual_seed(seed)
    decay = torch.logspace(0, -4, 12, dtype=torch.float64)
    sizes = 10 ** torch.rand(number, generator=generator).double()
    costs = [float(cost) for cost in cheap * torch.rand(number, generator=generator)]
    return [decay * size for size in sizes], [None, *costs[1:-1], None]


CASES = [(n, k, seed, cheap) for n, k in ((6, 1), (7, 3)) for seed in (0, 1) for cheap in (0.3, 30.0)]


@pytest.mark.parametrize(("number", "count", "seed", "cheap"), [*CASES, (12, 2, 0, 0.3)])
def test_no_other_set_of_layers_is_better(number: int, count: int, seed: int, cheap: float) -> None:
    spectra, costs = layers(seed, number, cheap)
    budget = 6 * number
    found = choose(spectra, costs, count, budget)
    assert len(found.linear) == count
    assert not {0, number - 1} & set(found.linear)
    assert (
        sum(row_bytes(width_counts(b)) for i, b in enumerate(found.bits) if i not in found.linear) <= budget
    )
    assert all(not found.bits[index].any() for index in found.linear)
    every = itertools.combinations(range(1, number - 1), count)
    best = min(with_linear(spectra, costs, one, budget).divergence for one in every)
    assert found.divergence == pytest.approx(best)


def test_a_layer_that_costs_more_in_codes_is_the_one() -> None:
    spectrum = torch.logspace(0, -4, 24, dtype=torch.float64)
    spectra = [spectrum, spectrum, 100 * spectrum, spectrum, spectrum]
    assert choose(spectra, [None, 1.0, 1.001, 1.0, None], 1, 20).linear == (2,)
    assert choose(spectra, [None, 1.0, 1e4, 0.9, None], 1, 20).linear == (3,)
