"""Layer-local reconstruction: training of one converted attention on the outputs of the donor's attention.

It needs neither labels nor a backward pass through the model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from ..convert.attention.half_attention import half_layers
from ..convert.attention.linalg import relative_error
from ..convert.methods.layer_fits import UNSEEN
from .coordinates import Coordinates, linear_coordinates

LEARNING_RATE = 1e-2  # per step, as a fraction of the RMS of each tensor
LINEAR_RATE = 3e-3  # with a linear mixer: at that of attentions the error on other rows rises
BETAS, MOMENTUM = (0.9, 0.95), 0.9  # of Adam, of Muon
# A matrix whose long side is so many times the short one, and the short one no less than LEAST_SHORT, is a bottleneck:
# Muon trains it in fewer steps than Adam. Its orthogonal steps cost little there, and more than they save elsewhere.
NARROW, LEAST_SHORT = 3, 16
MUON_RATE = 2.0  # of Adam's, for entries 0.4 times as large in the RMS
WARMUP = 5  # steps
EXACT = 1e-10  # a loss below this is float32 rounding, from which Adam would still take full steps


def fit(
    attention: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    *,
    steps: int,
    rows: int,
    seed: int,
    trained: Sequence[nn.Parameter] | None = None,
    bottlenecks: bool = False,
) -> None:
    """Train `attention` in place so that attention(inputs) ≈ targets.

    Adam (Muon for `bottlenecks`) in the coordinates of `heal.coordinates`, with a warm-up and a cosine to zero. The
    loss is ‖output − target‖² / ‖target‖² of the batch. One in UNSEEN rows is held out; if the error on them does not
    fall, the parameters are restored.

    Args:
        attention: every module in it that reads the input must be linear in it.
        inputs, targets: (N, L, D), on any device.
        position_embeddings: (cos, sin), each (1, L, head_dim), on the device of `attention`.
        steps: optimiser steps.
        rows: per step, drawn without replacement until all have been seen.
        trained: the parameters to train; None for all.
        bottlenecks: whether Muon trains the narrow matrices.
    """
    unseen = max(1, len(inputs) // UNSEEN) if len(inputs) > 1 else 0
    held_out = slice(len(inputs) - max(1, unseen), None)
    before = _error(attention, inputs[held_out], targets[held_out], position_embeddings)
    if before < EXACT or not steps:
        return
    parameters = [p for p in (attention.parameters() if trained is None else trained) if p.numel()]
    original = [parameter.detach().clone() for parameter in parameters]
    seen = len(inputs) - unseen
    x, y, cos_sin = inputs[:seen], targets[:seen], position_embeddings
    _train(attention, x, y, cos_sin, parameters, steps=steps, rows=rows, seed=seed, bottlenecks=bottlenecks)
    if not _error(attention, inputs[held_out], targets[held_out], position_embeddings) < before:
        with torch.no_grad():
            for parameter, value in zip(parameters, original, strict=True):
                parameter.copy_(value)


@torch.no_grad()
def _error(
    attention: nn.Module, inputs: Tensor, targets: Tensor, position_embeddings: tuple[Tensor, Tensor]
) -> float:
    """The relative squared error of attention(inputs)."""
    output = attention(inputs.to(position_embeddings[0].device), position_embeddings)[0]
    return relative_error(output, targets)


def _train(
    attention: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    parameters: list[nn.Parameter],
    *,
    steps: int,
    rows: int,
    seed: int,
    bottlenecks: bool,
) -> None:
    """Train the parameters in place; see `fit`."""
    space = linear_coordinates(attention, inputs, position_embeddings)
    input_root = next((c.root for c in space.values() if c.of_input), None)
    variables = [_variable(p, space.get(p)) for p in parameters]
    linear = any(hasattr(part, "mixer") for part in attention.modules())
    optimisers = _optimisers(variables, bottlenecks, LINEAR_RATE if linear else LEARNING_RATE)
    groups = [group for optimiser in optimisers for group in optimiser.param_groups]
    peaks = [group["lr"] for group in groups]
    device = position_embeddings[0].device
    batches = _batches(len(inputs), rows, torch.Generator().manual_seed(seed))
    for parameter in parameters:
        parameter.requires_grad_(True)
    for step in range(steps):
        rate = min(1.0, (step + 1) / WARMUP) * 0.5 * (1 + math.cos(math.pi * step / steps))
        for group, peak in zip(groups, peaks, strict=True):
            group["lr"] = peak * rate
        batch = next(batches)
        x, expected = inputs[batch].to(device), targets[batch].to(device)
        x = x if input_root is None else x @ input_root
        with torch.enable_grad():
            with half_layers(device):
                output = attention(x, position_embeddings)[0].float()
            loss = (output - expected).square().sum() / expected.square().sum()
            loss.backward()
        _step(optimisers, parameters, variables, space)
    for parameter in parameters:
        parameter.requires_grad_(False)
        parameter.grad = None
        if parameter in space and space[parameter].of_input:
            parameter.copy_(parameter @ space[parameter].root)


def _optimisers(
    variables: list[Tensor], bottlenecks: bool, highest: float = LEARNING_RATE
) -> list[torch.optim.Optimizer]:
    """Muon for the `bottlenecks` among the variables, Adam for the others; each variable with a rate of its own."""
    wide, narrow = [], []
    for variable in variables:
        rate = highest * tensor_scale(variable)
        sides = sorted(variable.shape)
        if bottlenecks and len(sides) == 2 and sides[1] >= NARROW * sides[0] >= NARROW * LEAST_SHORT:
            narrow.append({"params": [variable], "lr": MUON_RATE * rate})
        else:
            wide.append({"params": [variable], "lr": rate})
    found: list[torch.optim.Optimizer] = [torch.optim.Adam(wide, betas=BETAS)] if wide else []
    if narrow:
        found.append(
            torch.optim.Muon(narrow, momentum=MOMENTUM, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
        )
    return found


@torch.no_grad()
def _variable(parameter: Tensor, space: Coordinates | None) -> Tensor:
    """The optimiser's variable W' = W R⁻¹. For maps of the layer's input, which becomes x R, the module holds W'."""
    if space is None:
        return parameter
    if space.of_input:
        parameter.copy_(parameter @ space.inverse)
        return parameter
    return parameter @ space.inverse


@torch.no_grad()
def _step(
    optimisers: Sequence[torch.optim.Optimizer],
    parameters: list[nn.Parameter],
    variables: list[Tensor],
    space: dict[Tensor, Coordinates],
) -> None:
    """Transform the gradients to the variables, take a step, and transform the variables back to the parameters."""
    # The scores of a router have no gradient.
    pairs = [(p, v) for p, v in zip(parameters, variables, strict=True) if p is not v and p.grad is not None]
    for parameter, variable in pairs:
        assert parameter.grad is not None
        variable.grad = parameter.grad @ space[parameter].root
    for optimiser in optimisers:
        optimiser.step()
    for parameter, variable in pairs:
        parameter.copy_(variable @ space[parameter].root)
    for parameter in parameters:
        parameter.grad = None


def tensor_scale(parameter: Tensor) -> float:
    """The RMS of a tensor, at least 1e-4 so that a tensor of zeros can be trained."""
    return max(parameter.detach().square().mean().sqrt().item(), 1e-4)


def _batches(count: int, rows: int, generator: torch.Generator) -> Iterator[Tensor]:
    """An endless iterator of batches of row indices; every row occurs once before any is repeated."""
    while True:
        order = torch.randperm(count, generator=generator)
        yield from order.split(min(rows, count))
