"""Layer-local reconstruction: a converted attention learns to give the donor's attention output.

No backward pass through the model, no labels; each layer on its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from mhconvert.device import half_products

from ..convert.attention.linalg import relative_error
from .coordinates import Coordinates, linear_coordinates

LEARNING_RATE = 1e-2  # of each tensor's own RMS, per step
BETAS = (0.9, 0.95)
UNSEEN = 16  # one row in so many judges the fit
WARMUP = 5  # steps
EXACT = 1e-10  # loss that float32 rounding leaves of an exact layer; Adam would magnify it into real changes


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
) -> None:
    """Train parameters of `attention` in place, all or the `trained` ones, so that attention(inputs) ≈ targets.

    inputs, targets (N, L, D) on any device; position_embeddings (cos, sin) (1, L, head_dim) on the module's.
    `steps` Adam steps of `rows` rows each, drawn without replacement until all have been seen; the loss is the
    batch's ‖output − target‖² / ‖target‖²; the learning rate warms up, then follows a cosine to zero. The steps are
    taken in the coordinates of `heal.coordinates`, so all that reads the input must be linear in it.
    The last rows (one in 16) are not trained on: a layer whose error on them has not fallen is left as it was.
    """
    unseen = max(1, len(inputs) // UNSEEN) if len(inputs) > 1 else 0
    judge = slice(len(inputs) - max(1, unseen), None)
    before = _error(attention, inputs[judge], targets[judge], position_embeddings)
    if before < EXACT or not steps:
        return
    parameters = [p for p in (attention.parameters() if trained is None else trained) if p.numel()]
    original = [parameter.detach().clone() for parameter in parameters]
    seen = len(inputs) - unseen
    options = {"steps": steps, "rows": rows, "seed": seed}
    _train(attention, inputs[:seen], targets[:seen], position_embeddings, parameters, **options)
    if not _error(attention, inputs[judge], targets[judge], position_embeddings) < before:
        with torch.no_grad():
            for parameter, value in zip(parameters, original, strict=True):
                parameter.copy_(value)


@torch.no_grad()
def _error(
    attention: nn.Module, inputs: Tensor, targets: Tensor, position_embeddings: tuple[Tensor, Tensor]
) -> float:
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
) -> None:
    space = linear_coordinates(attention, inputs, position_embeddings)
    enter = next((c.root for c in space.values() if c.of_input), None)
    variables = [_variable(p, space.get(p)) for p in parameters]
    groups = [{"params": [v], "lr": LEARNING_RATE * tensor_scale(v)} for v in variables]
    optimiser = torch.optim.Adam(groups, betas=BETAS)
    peaks = [group["lr"] for group in optimiser.param_groups]
    device = position_embeddings[0].device
    batches = _batches(len(inputs), rows, torch.Generator().manual_seed(seed))
    for parameter in parameters:
        parameter.requires_grad_(True)
    for step in range(steps):
        rate = min(1.0, (step + 1) / WARMUP) * 0.5 * (1 + math.cos(math.pi * step / steps))
        for group, peak in zip(optimiser.param_groups, peaks, strict=True):
            group["lr"] = peak * rate
        batch = next(batches)
        x, expected = inputs[batch].to(device), targets[batch].to(device)
        x = x if enter is None else x @ enter
        with torch.enable_grad():
            with half_products(device):
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
    """Return the optimiser's variable W' = W R⁻¹; the module holds W' itself where its input is already x R."""
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
    """Take the parameters' gradients to the variables, step, and bring the variables' values back."""
    changed = zip(parameters, variables, strict=True)
    pairs = [
        (p, v) for p, v in changed if p is not v and p.grad is not None
    ]  # a router's scores have no gradient
    for parameter, variable in pairs:
        assert parameter.grad is not None
        variable.grad = parameter.grad @ space[parameter].root
    optimiser.step()
    for parameter, variable in pairs:
        parameter.copy_(variable @ space[parameter].root)
    for parameter in parameters:
        parameter.grad = None


def tensor_scale(parameter: Tensor) -> float:
    """Return the RMS of a tensor, at least a floor for one that starts at zero."""
    return max(parameter.detach().square().mean().sqrt().item(), 1e-4)


def _batches(count: int, rows: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Yield batches of row indices without end; every row once before any repeats."""
    while True:
        order = torch.randperm(count, generator=generator)
        yield from order.split(min(rows, count))
