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
from .coordinates import Coordinates, linear_coordinates

LEARNING_RATE = 1e-2  # per step, as a fraction of the RMS of each tensor
BETAS = (0.9, 0.95)
UNSEEN = 16  # one in UNSEEN rows is held out
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
    rate: float = LEARNING_RATE,
    trained: Sequence[nn.Parameter] | None = None,
) -> None:
    """Train `attention` in place so that attention(inputs) ≈ targets.

    Adam in the coordinates of `heal.coordinates`, with a warm-up and a cosine to zero. The loss is
    ‖output − target‖² / ‖target‖² of the batch. One in UNSEEN rows is held out; if the error on them does not fall,
    the parameters are restored.

    Args:
        attention: every module in it that reads the input must be linear in it.
        inputs, targets: (N, L, D), on any device.
        position_embeddings: (cos, sin), each (1, L, head_dim), on the device of `attention`.
        steps: optimiser steps.
        rows: per step, drawn without replacement until all have been seen.
        rate: the highest of a step, as a fraction of the RMS of each tensor.
        trained: the parameters to train; None for all.
    """
    unseen = max(1, len(inputs) // UNSEEN) if len(inputs) > 1 else 0
    held_out = slice(len(inputs) - max(1, unseen), None)
    before = _error(attention, inputs[held_out], targets[held_out], position_embeddings)
    if before < EXACT or not steps:
        return
    parameters = [p for p in (attention.parameters() if trained is None else trained) if p.numel()]
    original = [parameter.detach().clone() for parameter in parameters]
    seen = len(inputs) - unseen
    options = {"steps": steps, "rows": rows, "seed": seed}
    _train(attention, inputs[:seen], targets[:seen], position_embeddings, parameters, peak=rate, **options)
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
    peak: float,
    steps: int,
    rows: int,
    seed: int,
) -> None:
    """Train the parameters in place; see `fit`."""
    space = linear_coordinates(attention, inputs, position_embeddings)
    input_root = next((c.root for c in space.values() if c.of_input), None)
    variables = [_variable(p, space.get(p)) for p in parameters]
    groups = [{"params": [v], "lr": peak * tensor_scale(v)} for v in variables]
    optimiser = torch.optim.Adam(groups, betas=BETAS)
    peaks = [group["lr"] for group in optimiser.param_groups]
    device = position_embeddings[0].device
    batches = _batches(len(inputs), rows, torch.Generator().manual_seed(seed))
    for parameter in parameters:
        parameter.requires_grad_(True)
    for step in range(steps):
        rate = min(1.0, (step + 1) / WARMUP) * 0.5 * (1 + math.cos(math.pi * step / steps))
        for group, highest in zip(optimiser.param_groups, peaks, strict=True):
            group["lr"] = highest * rate
        batch = next(batches)
        x, expected = inputs[batch].to(device), targets[batch].to(device)
        x = x if input_root is None else x @ input_root
        with torch.enable_grad():
            with half_layers(device):
                output = attention(x, position_embeddings)[0].float()
            loss = (output - expected).square().sum() / expected.square().sum()
            loss.backward()
        _step(optimiser, parameters, variables, space)
    for parameter in parameters:
        parameter.requires_grad_(False)
        parameter.grad = None
        if parameter in space and space[parameter].of_input:
            parameter.copy_(parameter @ space[parameter].root)


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
    optimiser: torch.optim.Optimizer,
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
