"""The window and the sinks of one layer: brute force, the class's own softmax, and the fit of the sinks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mhconvert.convert.methods.swa.surgery import QUERIES, SinkFit, dropped, windowed
from mhconvert.convert.methods.swa.targets import NO_SINK

EXACT = 1e-5  # float32


def heads(length: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """query (2, 4, T, 8), key and value (2, 2, T, 8)."""
    generator = torch.Generator().manual_seed(seed)
    query, key, value = (torch.randn(2, n, length, 8, generator=generator) for n in (4, 2, 2))
    return query, key, value


def scores(query: Tensor, key: Tensor, softcap: float | None) -> tuple[Tensor, Tensor]:
    """(2, 4, T, T), and the distance of each query from each key."""
    found = query @ key.repeat_interleave(2, dim=1).mT * 0.3
    position = torch.arange(query.shape[2])
    return softcap * torch.tanh(found / softcap) if softcap else found, position[:, None] - position[None]


@pytest.mark.parametrize("length", [5, QUERIES + 40])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_a_window_is_a_mask(length: int, softcap: float | None) -> None:
    query, key, value = heads(length)
    window = 7
    every, distance = scores(query, key, softcap)
    masked = every.masked_fill((distance < 0) | (distance >= window), -torch.inf)
    outputs, sums = windowed(query, key, value, window, 0.3, softcap)
    expected = (masked.softmax(-1) @ value.repeat_interleave(2, dim=1)).transpose(1, 2)
    assert torch.allclose(outputs, expected, atol=EXACT)
    assert torch.allclose(sums, masked.logsumexp(-1).transpose(1, 2), atol=EXACT)


def test_the_dropped_mass_is_that_of_the_keys_before_the_window() -> None:
    query, key, value = heads(40)
    window = 7
    every, distance = scores(query, key, None)
    expected = every.masked_fill(distance < window, -torch.inf).logsumexp(-1).transpose(1, 2)[:, window:]
    _, inside = windowed(query, key, value, window, 0.3)
    assert torch.allclose(dropped(query, key, inside, window, 0.3), expected.double(), atol=1e-3)


def fitted(sinks: Tensor, start: float) -> tuple[Tensor, Tensor]:
    """The sinks that a fit finds where the wanted output has `sinks` (4,), and the fit's gates' error."""
    generator = torch.Generator().manual_seed(3)
    outputs, sums = torch.randn(300, 4, 8, generator=generator), torch.randn(300, 4, generator=generator)
    matrix = torch.randn(16, 4, 8, generator=generator)
    gates = (sums - sinks).sigmoid()
    wanted = torch.einsum("thd,th,Dhd->tD", outputs, gates, matrix)
    fit = SinkFit()
    fit.add(outputs, sums, matrix, wanted)
    found = fit.solve(torch.full((4,), start))
    return found, ((sums - found).sigmoid() - gates).abs().max()


@pytest.mark.parametrize("start", [-3.0, 0.0, 4.0])
def test_the_fit_finds_the_sinks_that_made_the_output(start: float) -> None:
    wanted = torch.tensor([-2.0, 0.5, 1.0, 3.0])
    found, error = fitted(wanted, start)
    assert torch.allclose(found, wanted.double(), atol=1e-3)
    assert error < 1e-3


def test_where_no_sink_is_best_there_is_none() -> None:
    found, error = fitted(torch.full((4,), NO_SINK), start=0.0)
    assert error < 1e-2
    assert (found < -4).all()


def test_gates_that_do_not_move_are_no_fault() -> None:
    fit = SinkFit()
    fit.add(torch.zeros(3, 4, 8), torch.zeros(3, 4), torch.zeros(16, 4, 8), torch.ones(3, 16))
    assert torch.isfinite(fit.solve(torch.zeros(4))).all()


def test_a_sink_is_the_logit_of_a_key_without_a_value() -> None:
    """As σ(lse − sink) times the output, and as one more entry of the softmax."""
    query, key, value = heads(20)
    sinks = torch.tensor([-1.0, 0.0, 0.5, 2.0])
    outputs, sums = windowed(query, key, value, 7, 0.3)
    every, distance = scores(query, key, None)
    masked = every.masked_fill((distance < 0) | (distance >= 7), -torch.inf)
    beside = torch.cat((masked, sinks.view(1, 4, 1, 1).expand(2, 4, 20, 1)), dim=-1).softmax(-1)[..., :-1]
    expected = (beside @ value.repeat_interleave(2, dim=1)).transpose(1, 2)
    assert torch.allclose(outputs * (sums - sinks).sigmoid()[..., None], expected, atol=EXACT)
