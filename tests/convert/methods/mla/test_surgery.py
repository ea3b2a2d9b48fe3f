"""Properties of the closed-form surgery. All of it is float64: 1e-9 of a quantity covers its factorisations."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mhconvert.convert.attention.weights import AttentionWeights, LayerStatistics, complex_pairs
from mhconvert.convert.methods.mla.rotary_components import kept_components, rotary_basis, series_components
from mhconvert.convert.methods.mla.surgery import LatentWeights, convert_layer
from tests.convert.methods.mla.layers import (
    HEADS,
    HIDDEN,
    WIDTH,
    nope_forms,
    random_rows,
    random_statistics,
    random_weights,
    rope_forms,
    value_forms,
)

EXACT = 1e-9
FREQUENCIES = WIDTH // 2
kv_heads = st.sampled_from([1, 2, 4])
seeds = st.integers(0, 50)
quick = settings(max_examples=25, deadline=None, derandomize=True)


def close(found: Tensor, expected: Tensor, scale: float | None = None) -> None:
    """Equal up to EXACT of the largest element of `expected`, or of `scale`."""
    largest = expected.abs().max().item() if scale is None else scale
    assert (found - expected).abs().max().item() <= EXACT * largest


def surgery(
    weights: AttentionWeights, statistics: LayerStatistics, count: int, rank: int, **options: object
) -> LatentWeights:
    basis = rotary_basis(weights, statistics)
    kept = kept_components(basis.damage, count)
    return convert_layer(weights, statistics, basis, kept, rank, 0.01, **options)  # type: ignore[arg-type]


def read_rows(latent: LatentWeights, rank: int) -> Tensor:
    """(H 2d, D): what kv_b_proj reads of the latent, without the rotary key."""
    return latent.kv_b_proj[:, :rank] @ latent.kv_a_proj_with_mqa[:rank]


def output_error(latent: LatentWeights, weights: AttentionWeights, moment: Tensor) -> float:
    """E‖W_o (v − v̂)‖² over tokens with second moment `moment`, all heads."""
    exact = torch.einsum("Dhd,hde->hDe", weights.o, weights.v[weights.group])
    lost = exact - value_forms(latent)
    return torch.einsum("hij,jk,hik->", lost, moment, lost).item()


@quick
@given(kv_heads, seeds)
def test_mixing_and_down_are_inverse(groups: int, seed: int) -> None:
    basis = rotary_basis(random_weights(groups, seed), random_statistics(seed))
    identity = torch.eye(groups, dtype=torch.complex128).expand(FREQUENCIES, -1, -1)
    close(basis.mixing @ basis.down, identity)


def test_mixing_and_down_are_inverse_where_a_head_is_never_read() -> None:
    weights = random_weights(2)
    silent = replace(weights, q=weights.q * torch.tensor([1, 1, 0, 0]).view(-1, 1, 1))
    basis = rotary_basis(silent, random_statistics())
    assert torch.isfinite(torch.view_as_real(basis.mixing)).all()
    # The head's weight is floored at 1e-12 of the largest, so its row is scaled by 1e6.
    assert (basis.mixing @ basis.down - torch.eye(2)).abs().max() < 1e-6


@quick
@given(kv_heads, seeds, st.sampled_from([1.0, 1.3]))
def test_damage_is_not_negative(groups: int, seed: int, gain: float) -> None:
    statistics = random_statistics(seed, gain)
    basis = rotary_basis(random_weights(groups, seed), statistics)
    assert (basis.damage >= 0).all()
    known = replace(statistics, phases=statistics.phases / statistics.phases.abs() * gain)
    none = rotary_basis(random_weights(groups, seed), known).damage
    assert none.max() <= 1e-12 * basis.damage.max()  # |exp(iφ)|² is 1 up to float64 rounding
    lost = rotary_basis(random_weights(groups, seed), replace(statistics, phases=0 * statistics.phases))
    assert (lost.damage >= basis.damage).all()


def test_the_ropes_gain_does_not_reorder_the_damage() -> None:
    plain, scaled = random_statistics(3), random_statistics(3, gain=1.3)
    expected = rotary_basis(random_weights(2), plain).damage * 1.3**2
    close(rotary_basis(random_weights(2), scaled).damage, expected)


@quick
@given(kv_heads, seeds)
def test_damage_without_phases_is_half_the_score_variance(groups: int, seed: int) -> None:
    """Σ over components of ½ λ = ½ Σ over heads of E|q|² E|k|² in each frequency: the trace of the weighted PCA."""
    weights, statistics = random_weights(groups, seed), random_statistics(seed)
    damage = rotary_basis(weights, replace(statistics, phases=0 * statistics.phases)).damage
    rows = random_rows(seed)

    def energy(projections: Tensor) -> Tensor:
        return (complex_pairs(projections) @ rows.mT.to(torch.complex128)).abs().square().mean(-1)  # F heads

    expected = 0.5 * (energy(weights.q) * energy(weights.k)[:, weights.group]).sum(-1)
    close(damage.sum(-1), expected)


@given(st.integers(1, 12), st.integers(1, 5), st.integers(0, 60), seeds)
@quick
def test_kept_components_are_the_worst_to_lose(frequencies: int, groups: int, count: int, seed: int) -> None:
    damage = torch.rand(
        frequencies, groups, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    count = min(count, frequencies * groups)
    kept = kept_components(damage, count)
    assert kept.shape == damage.shape
    assert int(kept.sum()) == count
    if 0 < count < damage.numel():
        assert damage[kept].min() >= damage[~kept].max()
    tied = kept_components(torch.zeros(frequencies, groups), count)
    assert int(tied.sum()) == count


@given(st.integers(1, 12), st.integers(1, 5), st.integers(0, 12), seeds)
@quick
def test_a_series_has_one_component_in_each_high_frequency(f: int, g: int, count: int, seed: int) -> None:
    damage = torch.rand(f, g, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    count = min(count, f)
    kept = series_components(damage, count)
    assert kept.sum(-1).tolist() == [1] * count + [0] * (f - count)
    assert torch.equal(damage[kept], damage[:count].amax(-1))


@quick
@given(kv_heads, seeds, st.integers(0, 4), st.booleans(), st.sampled_from([1e-4, 0.01, 1.0]))
def test_the_full_rank_is_exact(groups: int, seed: int, count: int, bias: bool, price: float) -> None:
    """Whatever the statistics: means, prices and phases matter only where something is left out."""
    weights, statistics = random_weights(groups, seed), random_statistics(seed)
    basis = rotary_basis(weights, statistics)
    kept = kept_components(basis.damage, count)
    rank = 2 * int((~kept).sum()) + groups * WIDTH
    latent = convert_layer(weights, statistics, basis, kept, rank, price, bias)
    values = torch.einsum("Dhd,hde->hDe", weights.o, weights.v[weights.group])
    close(value_forms(latent), values)
    close(latent.o_bias, torch.zeros(HIDDEN), values.abs().max().item())
    # Whole scores at distance 0 with phases 1: components with RoPE and without add up to qᵀk.
    still = replace(statistics, phases=torch.ones_like(statistics.phases))
    latent = convert_layer(weights, still, basis, kept, rank, price, bias)
    exact = weights.q.mT @ weights.k[weights.group]
    close(nope_forms(latent) + rope_forms(latent).real.sum(1), exact)


@quick
@given(kv_heads, seeds, st.booleans())
def test_the_error_never_rises_with_the_rank(groups: int, seed: int, bias: bool) -> None:
    """In the metric the latent is made for; with no key in the latent that is the values' output error."""
    weights, statistics = random_weights(groups, seed), random_statistics(seed)
    spread = statistics.key_moment - bias * torch.outer(statistics.key_mean, statistics.key_mean)
    ranks = range(1, groups * WIDTH + 1)
    everything = FREQUENCIES * groups
    errors = [
        output_error(surgery(weights, statistics, everything, rank, output_bias=bias), weights, spread)
        for rank in ranks
    ]
    exact = torch.einsum("Dhd,hde->hDe", weights.o, weights.v[weights.group])
    whole = torch.einsum("hij,jk,hik->", exact, spread, exact).item()
    assert all(later <= earlier + EXACT * whole for earlier, later in pairwise(errors))
    assert errors[-1] <= EXACT * whole


@quick
@given(kv_heads, seeds, st.integers(1, 12))
def test_the_bias_restores_the_mean_of_the_values(groups: int, seed: int, rank: int) -> None:
    weights, statistics = random_weights(groups, seed), random_statistics(seed)
    latent = surgery(weights, statistics, 2, rank)
    mean = statistics.key_mean
    exact = torch.einsum("Dhd,hde,e->D", weights.o, weights.v[weights.group], mean)
    close(value_forms(latent).sum(0) @ mean + latent.o_bias, exact)


@quick
@given(kv_heads, seeds)
def test_without_a_bias_the_keys_mean_stays_out_of_the_values(groups: int, seed: int) -> None:
    """A latent that leaves out the mean of the keys has a constant error in the values that only a bias can mend."""
    weights, statistics = random_weights(groups, seed), random_statistics(seed)
    latent = surgery(weights, statistics, 2, 3 * groups, output_bias=False)
    assert not latent.o_bias.any()
    centred = surgery(weights, statistics, 2, 3 * groups)
    moment = statistics.key_moment
    assert output_error(latent, weights, moment) < 1.05 * output_error(centred, weights, moment)


@quick
@given(kv_heads, seeds, st.floats(0.01, 100), st.floats(0.01, 100))
def test_units_do_not_matter(groups: int, seed: int, scale: float, loudness: float) -> None:
    """Queries twice as large on keys half as large, or all activations in other units: the same function."""
    weights, statistics = random_weights(groups, seed), random_statistics(seed)
    expected = surgery(weights, statistics, 3, 2 * groups)
    rescaled = replace(weights, q=weights.q * scale, k=weights.k / scale)
    louder = replace(
        statistics,
        query_moment=statistics.query_moment * loudness**2,
        key_moment=statistics.key_moment * loudness**2,
        key_mean=statistics.key_mean * loudness,
    )
    for latent in (surgery(rescaled, statistics, 3, 2 * groups), surgery(weights, louder, 3, 2 * groups)):
        assert latent.frequencies == expected.frequencies
        for forms in (nope_forms, rope_forms, value_forms):
            close(forms(latent), forms(expected))


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_sizes(groups: int) -> None:
    latent = surgery(random_weights(groups), random_statistics(), 3, 5)
    assert len(latent.frequencies) == 3
    assert latent.q_proj.shape == (HEADS * (WIDTH + 6), HIDDEN)
    assert latent.kv_a_proj_with_mqa.shape == (5 + 6, HIDDEN)
    assert latent.kv_b_proj.shape == (HEADS * 2 * WIDTH, 5)
    assert latent.o_proj.shape == (HIDDEN, HEADS * WIDTH)
    assert latent.o_bias.shape == (HIDDEN,)


def test_arguments_are_left_alone() -> None:
    weights, statistics = random_weights(2), random_statistics()
    before = [
        t.clone() for part in (weights, statistics) for t in vars(part).values() if isinstance(t, Tensor)
    ]
    surgery(weights, statistics, 3, 5, output_bias=False)
    after = [t for part in (weights, statistics) for t in vars(part).values() if isinstance(t, Tensor)]
    assert all(map(torch.equal, before, after))


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("seed", [0, 1])
def test_values_read_from_the_rotary_key_lose_less(kv_heads: int, seed: int) -> None:
    """At the same cache. A price on values alone makes their error what the latent is chosen for."""
    weights, statistics = random_weights(kv_heads, seed), random_statistics(seed)
    basis = rotary_basis(weights, statistics)
    kept = kept_components(basis.damage, 3)
    covariance = statistics.key_moment - torch.outer(statistics.key_mean, statistics.key_mean)
    errors = []
    for together in (False, True):
        latent = convert_layer(weights, statistics, basis, kept, 4, 1e6, rope_in_latent=together)
        read = latent.kv_a_proj_with_mqa[: latent.kv_b_proj.shape[1]]
        value_up = latent.kv_b_proj.view(HEADS, 2 * WIDTH, -1)[:, WIDTH:]
        lost = weights.v[weights.group] - value_up @ read
        outputs = torch.einsum("Dhd,hdE->hDE", weights.o, lost)
        # errors of one head's outputs; heads of a group share their values
        errors.append(torch.einsum("hDE,EF,hDF->", outputs, covariance, outputs).item())
        assert latent.kv_a_proj_with_mqa.shape[0] == 4 + 6
        assert latent.kv_b_proj.shape[1] == 4 + 6 * together
    assert errors[1] < 0.95 * errors[0]


@pytest.mark.parametrize("told", [False, True])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_a_spread_latent_is_the_same_function_whose_elements_vary_alike(groups: int, told: bool) -> None:
    weights, statistics = random_weights(groups), random_statistics()
    plain, spread = (
        surgery(weights, statistics, 3, 8, rope_in_latent=told, spread=turned) for turned in (False, True)
    )
    for found, expected in ((spread.q_proj, plain.q_proj), (read_rows(spread, 8), read_rows(plain, 8))):
        close(found, expected)
    assert torch.equal(spread.kv_a_proj_with_mqa[8:], plain.kv_a_proj_with_mqa[8:])
    assert torch.equal(spread.kv_b_proj[:, 8:], plain.kv_b_proj[:, 8:])
    variances = []
    for latent in (plain, spread):
        rows = latent.kv_a_proj_with_mqa[:8]
        covariance = statistics.key_moment - torch.outer(statistics.key_mean, statistics.key_mean)
        variances.append((rows @ covariance * rows).sum(1))
    assert variances[1].sum() == pytest.approx(variances[0].sum().item(), rel=EXACT)
    assert variances[1].max() / variances[1].min() < (variances[0].max() / variances[0].min()) ** 0.7


@pytest.mark.parametrize("told", [False, True])
@quick
@given(groups=kv_heads, seed=seeds)
def test_what_is_cached_is_as_large_as_what_reads_it(told: bool, groups: int, seed: int) -> None:
    """Within the factor 2 that powers of two leave, and whatever the loudness of the text."""
    weights, statistics = random_weights(groups, seed), random_statistics(seed)
    latent = surgery(weights, statistics, 3, 2 * groups, rope_in_latent=told)
    rank = len(latent.kv_a_proj_with_mqa) - 6
    written = latent.kv_a_proj_with_mqa.square().mean(1)
    read = written.new_zeros(len(written))
    read[: latent.kv_b_proj.shape[1]] = latent.kv_b_proj.square().mean(0)
    read[rank:] += latent.q_proj.view(HEADS, -1, HIDDEN)[:, WIDTH:].square().mean((0, 2))
    pairs = (sizes[rank:].view(-1, 2).mean(1) for sizes in (written, read))
    ratios = torch.cat((written[:rank] / read[:rank], next(pairs) / next(pairs))).sqrt()
    assert ratios.max() <= 2**1.001
    assert ratios.min() >= 2**-1.001
