"""The width of the keys without RoPE: the best form of each rank, and which rank a layer gets. Float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mhconvert.convert.methods.mla.rotary_components import kept_components, rotary_basis
from mhconvert.convert.methods.mla.score_rank import least_width, narrowed, score_factors
from mhconvert.convert.methods.mla.surgery import LatentWeights, convert_layer
from tests.convert.methods.mla.layers import (
    HEADS,
    WIDTH,
    nope_forms,
    nope_width,
    random_statistics,
    random_weights,
    rope_forms,
    value_forms,
)

READ = 11
EXACT = 1e-10
seeds = st.integers(0, 50)
quick = settings(max_examples=25, deadline=None, derandomize=True)


def draw(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def layer(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Query maps (H, d, d), keys (H, d, m) and the moments of what both read, all of unequal directions."""
    generator = torch.Generator().manual_seed(seed)
    fall = torch.logspace(0, -1.5, READ, dtype=torch.float64)
    keys = draw(generator, HEADS, WIDTH, READ) * torch.logspace(0, -1, WIDTH, dtype=torch.float64).unsqueeze(
        1
    )
    queries, reads = (
        draw(generator, HEADS, WIDTH, 3 * WIDTH),
        draw(generator, READ, 5 * READ) * fall.unsqueeze(1),
    )
    return draw(generator, HEADS, WIDTH, WIDTH), keys, queries @ queries.mT, reads @ reads.mT


def lost(found: Tensor, exact: Tensor, queries: Tensor, reads: Tensor) -> Tensor:
    """(H,), E[(qᵀ (found − exact) c)²] of independent q and c."""
    difference = found - exact
    return torch.einsum("hij,jk,hlk,hil->h", difference, reads, difference, queries)


@quick
@given(seeds)
def test_all_products_are_the_scores(seed: int) -> None:
    maps, keys, queries, reads = layer(seed)
    new_maps, new_keys, _ = score_factors(maps, keys, queries, reads)
    exact = maps.mT @ keys
    assert (new_maps.mT @ new_keys - exact).abs().max() < EXACT * exact.abs().max()


@quick
@given(seeds, st.integers(1, WIDTH))
def test_what_a_rank_loses_is_the_tail_and_no_other_form_loses_less(seed: int, rank: int) -> None:
    maps, keys, queries, reads = layer(seed)
    new_maps, new_keys, energy = score_factors(maps, keys, queries, reads)
    exact = maps.mT @ keys
    best = lost(new_maps[:, :rank].mT @ new_keys[:, :rank], exact, queries, reads)
    whole = energy.sum(1)
    torch.testing.assert_close(best, energy[:, rank:].sum(1), rtol=1e-9, atol=EXACT * whole.max().item())
    assert (energy.diff(dim=1) <= 0).all()
    generator = torch.Generator().manual_seed(seed)
    for size in (1e-3, 0.1, 1.0):
        near = new_maps[:, :rank] * (1 + size * draw(generator, HEADS, rank, WIDTH))
        other = near.mT @ (new_keys[:, :rank] * (1 + size * draw(generator, HEADS, rank, READ)))
        assert (lost(other, exact, queries, reads) >= best - EXACT * whole).all()


@pytest.mark.parametrize(
    ("energy", "loss", "rotary", "width"),
    [
        ([8.0, 1, 1, *[0.0] * 13], 0.0, 14, 10),  # 3 + 14 elements: of whole vectors 24
        ([8.0, 1, 1, 0, 0, 0, 0, 0], 0.15, 6, 2),  # 2 + 6 elements are one vector
        ([8.0, 1, 1, 0, 0, 0, 0, 0], 0.15, 8, 8),
        ([8.0, 0, 0, 0, 0, 0, 0, 0], 0.0, 2, 6),  # values are eight elements wide anyway
        ([0.0] * 8, 0.0, 12, 4),
        ([1.0] * 8, 0.0, 12, 8),
    ],
)
def test_the_least_width(energy: list[float], loss: float, rotary: int, width: int) -> None:
    assert least_width(torch.tensor([energy, energy]), loss, rotary) == width


def test_heads_share_what_may_be_lost() -> None:
    energy = torch.tensor([[90.0, 9, 0, 0, 0, 0, 0, 0], [1.0, 0.5, 0.1, 0, 0, 0, 0, 0]])
    assert least_width(energy, 0.002, 8) == 8
    assert least_width(torch.tensor([[1.0, *[0.0] * 15]] * 2), 0.0, 16) == 8


def test_both_sides_are_of_one_magnitude() -> None:
    maps, keys, _, reads = layer(3)
    weights = draw(torch.Generator().manual_seed(5), HEADS, WIDTH, 20) * 1e3
    moments = torch.eye(20, dtype=torch.float64), reads
    queries, narrow = narrowed(maps, keys, weights, moments, 0.2, 12)
    assert queries.shape[1] == narrow.shape[1] == 4
    ratio = ((queries @ weights).square().mean(2) / narrow.square().mean(2)).sqrt()
    assert ratio.max() <= 2**1.001
    assert ratio.min() >= 2**-1.001


def converted(groups: int, seed: int, rank: int, components: int, **options: object) -> LatentWeights:
    weights, statistics = random_weights(groups, seed), random_statistics(seed)
    basis = rotary_basis(weights, statistics)
    kept = kept_components(basis.damage, components)
    return convert_layer(weights, statistics, basis, kept, rank, 0.01, **options)  # type: ignore[arg-type]


@quick
@given(st.sampled_from([1, 2, 4]), seeds, st.booleans())
def test_keys_of_a_low_rank_lose_nothing(groups: int, seed: int, told: bool) -> None:
    """A loss of next to nothing is none: the function stays the same, whatever kv_b_proj reads."""
    sizes = (1, 1) if told else (3, 2)  # of what kv_b_proj reads: 3 elements
    whole = converted(groups, seed, *sizes, rope_in_latent=told)
    narrow = converted(groups, seed, *sizes, rope_in_latent=told, score_loss=1e-12, constant_cancels=False)
    assert nope_width(whole) == WIDTH
    assert nope_width(narrow) == (6 if told else 4)  # with the rotary key one vector of eight
    for forms in (nope_forms, value_forms, rope_forms):
        exact = forms(whole)
        assert (forms(narrow) - exact).abs().max() < 1e-9 * exact.abs().max()


def test_a_constant_is_kept_where_it_does_not_cancel() -> None:
    """Keys whose energy is nearly all in their mean: the narrow form keeps the mean only where it has to."""
    weights, statistics = random_weights(4), random_statistics()
    mean = 30 * statistics.key_mean
    moment = (
        statistics.key_moment
        - torch.outer(statistics.key_mean, statistics.key_mean)
        + torch.outer(mean, mean)
    )
    statistics = replace(statistics, key_mean=mean, key_moment=moment)
    basis = rotary_basis(weights, statistics)
    kept = kept_components(basis.damage, 2)
    whole, varying, all_of_it = (
        convert_layer(
            weights, statistics, basis, kept, 8, 0.01, False, score_loss=loss, constant_cancels=cancels
        )
        for loss, cancels in ((None, True), (0.3, True), (0.3, False))
    )
    errors = []
    for narrow in (varying, all_of_it):
        assert nope_width(narrow) == 4
        missing = (nope_forms(narrow) - nope_forms(whole)) @ mean
        errors.append(torch.einsum("hi,ij,hj->", missing, statistics.query_moment, missing).item())
    assert errors[1] < 1e-3 * errors[0]
