"""The layer-local fit: it learns, leaves what is right alone, and repeats itself."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mhconvert.convert.methods.mla.settings import MLASettings
from mhconvert.heal.layer_fit import LEARNING_RATE, LEAST_SHORT, NARROW, UNSEEN, _optimisers, fit
from tests.convert.conversions import attention_inputs, converted, donor_model, rotary_of, token_ids

Problem = tuple[nn.Module, Tensor, Tensor, tuple[Tensor, Tensor]]


def problem(budget: float, layer: int = 1) -> Problem:
    """A converted layer, inputs (24, 32, D) of it, the donor's outputs for them, cos and sin."""
    donor = donor_model()
    embeddings = rotary_of(donor, 32)
    inputs = attention_inputs(donor, token_ids(24, 32, seed=5))[layer]
    with torch.no_grad():
        targets = donor.model.layers[layer].self_attn(inputs, embeddings, None)[0]
    model = converted(donor, MLASettings(kv_budget=budget, kv_bits="16")).requires_grad_(False)
    return model.model.layers[layer].self_attn, inputs, targets, embeddings


@torch.no_grad()
def error(attention: nn.Module, inputs: Tensor, targets: Tensor, embeddings: tuple[Tensor, Tensor]) -> float:
    """‖output − target‖² / ‖target‖²."""
    return ((attention(inputs, embeddings)[0] - targets).square().sum() / targets.square().sum()).item()


def fitted(attention: nn.Module, *data: Any, steps: int = 40, seed: int = 0, rows: int = 4) -> nn.Module:
    attention = copy.deepcopy(attention)
    fit(attention, *data, steps=steps, rows=rows, seed=seed)
    return attention


def test_the_fit_lowers_the_error_on_rows_it_has_not_seen() -> None:
    attention, inputs, targets, embeddings = problem(0.4)
    before = error(attention, inputs[16:], targets[16:], embeddings)
    trained = fitted(attention, inputs[:16], targets[:16], embeddings, steps=100)
    after = error(trained, inputs[16:], targets[16:], embeddings)
    assert after < 0.85 * before  # 512 tokens cannot teach 14 000 parameters everything


@pytest.mark.parametrize("steps", [1, 40])
def test_an_exact_layer_stays_exact(steps: int) -> None:
    """Adam divides by the gradient's own size, so rounding errors alone would push an exact layer about."""
    attention, *data = problem(1.0)
    assert error(attention, *data) < 1e-11  # (a few float32 roundings)²
    assert error(fitted(attention, *data, steps=steps), *data) < 1e-11


def test_a_seed_gives_the_same_bits_and_another_does_not() -> None:
    attention, *data = problem(0.4)
    first, again, other = (fitted(attention, *data, steps=6, seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(again[name], tensor) for name, tensor in first.items())
    assert any(not torch.equal(other[name], tensor) for name, tensor in first.items())


def test_every_parameter_learns_and_none_keeps_a_gradient() -> None:
    attention, *data = problem(0.4)
    after = fitted(attention, *data, steps=3)
    for name, parameter in after.named_parameters():
        assert not parameter.requires_grad
        assert parameter.grad is None
        assert not torch.equal(parameter, attention.get_parameter(name)), name


def test_no_global_random_state_is_touched() -> None:
    attention, *data = problem(0.4)
    before = torch.get_rng_state()
    fitted(attention, *data, steps=3)
    assert torch.equal(torch.get_rng_state(), before)


def test_no_steps_change_nothing() -> None:
    attention, *data = problem(0.4)
    after = fitted(attention, *data, steps=0).state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in attention.state_dict().items())


def test_more_rows_a_step_than_there_are() -> None:
    attention, *data = problem(0.4)
    assert error(fitted(attention, *data, rows=100), *data) < error(attention, *data)


def test_the_inputs_are_left_alone_and_need_no_gradient() -> None:
    attention, inputs, targets, embeddings = problem(0.4)
    before = inputs.clone(), targets.clone()
    with torch.no_grad():
        fitted(attention, inputs, targets, embeddings, steps=2)
    assert torch.equal(inputs, before[0])
    assert torch.equal(targets, before[1])


@pytest.mark.parametrize("budget", [0.98, 0.95, 0.5])
def test_the_rows_that_judge_never_get_worse(budget: float) -> None:
    """Few tokens can fit a nearly exact layer to themselves and hurt it elsewhere; then the closed form stays."""
    attention, inputs, targets, embeddings = problem(budget)
    unseen = slice(len(inputs) - max(1, len(inputs) // UNSEEN), None)
    judged = (inputs[unseen], targets[unseen], embeddings)
    trained = fitted(attention, inputs, targets, embeddings, steps=100)
    assert error(trained, *judged) <= error(attention, *judged)


class Bottleneck(nn.Module):
    """A map of rank 16 from 64 elements to 64, with the call signature of an attention."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        self.down, self.up = nn.Linear(64, 16, bias=False), nn.Linear(16, 64, bias=False)
        for weight in self.parameters():
            weight.data = torch.randn(weight.shape, generator=draw)

    def forward(self, x: Tensor, _: Any) -> tuple[Tensor]:
        return (self.up(self.down(x)),)


@pytest.mark.parametrize(("bottlenecks", "part"), [(False, 0.6), (True, 0.9)])
def test_bottlenecks_learn_with_either_optimiser(bottlenecks: bool, part: float) -> None:
    start = Bottleneck(0).requires_grad_(False)
    end = copy.deepcopy(start)
    for number, weight in enumerate(end.parameters()):
        weight += 0.3 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(9 + number))
    inputs = torch.randn(24, 32, 64, generator=torch.Generator().manual_seed(1))
    data = (inputs, end(inputs, None)[0], (inputs, inputs))
    trained = copy.deepcopy(start)
    fit(trained, *data, steps=40, rows=4, seed=0, bottlenecks=bottlenecks)
    assert error(trained, *data) < part * error(start, *data)


def test_only_narrow_matrices_are_bottlenecks() -> None:
    short, long = LEAST_SHORT, NARROW * LEAST_SHORT
    shapes = [(short, long), (long, short), (short, long - 1), (short - 1, 2 * long), (long,)]
    variables = [torch.ones(shape) for shape in shapes]
    adam, muon = _optimisers(variables, bottlenecks=True)
    assert [group["params"][0].shape for group in muon.param_groups] == shapes[:2]
    assert [group["params"][0].shape for group in adam.param_groups] == shapes[2:]
    [alone] = _optimisers(variables, bottlenecks=False)
    assert [group["lr"] for group in alone.param_groups] == pytest.approx([LEARNING_RATE] * 5)
