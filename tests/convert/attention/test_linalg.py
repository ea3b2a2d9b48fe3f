"""Properties of the surgeries' linear algebra. float64: 1e-9 of a quantity covers a few factorisations."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mhconvert.convert.attention.linalg import (
    complex_pca,
    interleaved,
    low_rank,
    realified,
    roots,
    spreading_rotation,
)

EXACT = 1e-9
sizes, seeds = st.integers(1, 12), st.integers(0, 50)
quick = settings(max_examples=25, deadline=None, derandomize=True)


def semidefinite(size: int, seed: int, rank: int | None = None) -> Tensor:
    """A random positive semi-definite (size, size) matrix of full rank, or of `rank`."""
    generator = torch.Generator().manual_seed(seed)
    factor = torch.randn(size, size + 2 if rank is None else rank, generator=generator, dtype=torch.float64)
    return factor @ factor.mT


def lost(moment: Tensor, metric: Tensor, product: Tensor) -> float:
    """E[(y − ŷ)ᵀ metric (y − ŷ)] for ŷ = product @ y."""
    rest = torch.eye(len(moment), dtype=torch.float64) - product
    return (metric * (rest @ moment @ rest.mT)).sum().item()


@quick
@given(sizes, seeds, st.booleans())
def test_roots(size: int, seed: int, singular: bool) -> None:
    matrix = semidefinite(size, seed, max(1, size // 2) if singular else None)
    root, inverse = roots(matrix)
    scale = matrix.abs().max().item()
    assert (root @ root - matrix).abs().max() <= EXACT * scale
    assert (inverse @ root @ root - root).abs().max() <= 1e-5 * scale**0.5  # √ of the rank tolerance
    assert (inverse - inverse.mT).abs().max() <= EXACT * inverse.abs().max()


def test_roots_of_nothing() -> None:
    assert not any(part.any() for part in roots(torch.zeros(3, 3, dtype=torch.float64)))


@quick
@given(sizes, seeds)
def test_low_rank_is_exact_at_full_rank(size: int, seed: int) -> None:
    up, down = low_rank(semidefinite(size, seed), semidefinite(size, seed + 1), size)
    # A square of 12 Gaussian columns of 14 has a condition number up to 1e4, of which the root appears here.
    torch.testing.assert_close(up @ down, torch.eye(size, dtype=torch.float64), atol=1e-8, rtol=0)


@quick
@given(sizes, seeds)
def test_low_rank_loses_nothing_that_a_singular_metric_sees(size: int, seed: int) -> None:
    moment, metric = semidefinite(size, seed), semidefinite(size, seed + 1, max(1, size // 2))
    up, down = low_rank(moment, metric, max(1, size // 2))
    assert lost(moment, metric, up @ down) <= EXACT * (metric * moment).sum().item()


@quick
@given(sizes, seeds)
def test_the_error_is_the_smallest_and_never_rises(size: int, seed: int) -> None:
    moment, metric = semidefinite(size, seed), semidefinite(size, seed + 1)
    whole = (metric * moment).sum().item()
    generator, last = torch.Generator().manual_seed(seed), whole
    for rank in range(1, size + 1):
        up, down = low_rank(moment, metric, rank)
        error = lost(moment, metric, up @ down)
        assert error <= last + EXACT * whole
        last = error
        for _ in range(3):
            a = up + 0.1 * torch.randn(up.shape, generator=generator, dtype=torch.float64)
            b = down + 0.1 * torch.randn(down.shape, generator=generator, dtype=torch.float64)
            assert lost(moment, metric, a @ b) >= error - EXACT * whole


@quick
@given(sizes, seeds, st.floats(1e-3, 1e3), st.floats(1e-3, 1e3))
def test_units_do_not_matter(size: int, seed: int, of_moment: float, of_metric: float) -> None:
    moment, metric, rank = semidefinite(size, seed), semidefinite(size, seed + 1), max(1, size // 2)
    up, down = low_rank(moment, metric, rank)
    other_up, other_down = low_rank(moment * of_moment, metric * of_metric, rank)
    torch.testing.assert_close(
        other_up @ other_down, up @ down, atol=1e-7, rtol=1e-7
    )  # eigenvectors of close values


@quick
@given(st.integers(1, 4), st.integers(1, 5), seeds)
def test_complex_pca(frequencies: int, heads: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    factor = torch.randn(frequencies, heads, heads + 1, generator=generator, dtype=torch.complex128)
    weights = torch.rand(frequencies, heads, generator=generator, dtype=torch.float64)
    values, vectors = complex_pca(factor @ factor.mH, weights)
    assert (values.diff(dim=-1) <= 0).all()
    assert (values >= 0).all()
    root = torch.diag_embed(weights.sqrt()).to(torch.complex128)
    torch.testing.assert_close((vectors * values.unsqueeze(1)) @ vectors.mH, root @ factor @ factor.mH @ root)
    unit = torch.eye(heads, dtype=torch.complex128).expand(frequencies, -1, -1)
    torch.testing.assert_close(vectors.mH @ vectors, unit, atol=EXACT, rtol=0)


@pytest.mark.parametrize("shape", [(3, 4), (1, 1), (2, 0)])
def test_realified_does_to_halves_what_the_matrix_does(
    shape: tuple[int, int], generator: torch.Generator
) -> None:
    matrix = torch.randn(shape, generator=generator, dtype=torch.complex128)
    z = torch.randn(shape[1], generator=generator, dtype=torch.complex128)
    expected = matrix @ z
    product = realified(matrix) @ torch.cat((z.real, z.imag))
    torch.testing.assert_close(product, torch.cat((expected.real, expected.imag)))


def test_interleaved_puts_the_parts_of_a_number_side_by_side() -> None:
    rows = torch.tensor([[1.0], [2.0], [3.0], [10.0], [20.0], [30.0]]).expand(2, 6, 1)
    assert interleaved(rows)[1, :, 0].tolist() == [1, 10, 2, 20, 3, 30]


@pytest.mark.parametrize("size", [1, 2, 3, 12, 64, 448])
def test_a_spreading_rotation_is_orthogonal_and_leaves_no_entry_large(size: int) -> None:
    turn = spreading_rotation(size)
    assert (turn @ turn.mT - torch.eye(size)).abs().max() < EXACT
    assert turn.abs().max() <= (2 / size) ** 0.5 + EXACT
    if size & (size - 1) == 0:
        assert torch.allclose(turn.abs(), torch.full_like(turn, size**-0.5))
