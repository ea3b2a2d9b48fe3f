"""Layer-local reconstruction: a converted attention learns to give the donor's attention output.

No backward pass through the model, no labels; each layer on its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from mhconvert.convert.linalg import relative_error

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
) -> None:
    """Train every parameter of `attention` in place so that attention(inputs) ≈ targets.

    inputs, targets (N, L, D) on any device; position_embeddings (cos, sin) (1, L, head_dim) on the module's.
    `steps` Adam steps of `rows` rows each, drawn without replacement until all have been seen; the loss is the
    batch's ‖output − target‖² / ‖target‖²; the learning rate warms up, then follows a cosine to zero.
    The last rows (one in 16) are not trained on: a layer whose error on them has not fallen is left as it was.
    """
    unseen = max(1, len(inputs) // UNSEEN) if len(inputs) > 1 else 0
    judge = slice(len(inputs) - max(1, unseen), None)
    before = _error(attention, inputs[judge], targets[judge], position_embeddings)
    if before < EXACT:
        return
    original = {name: tensor.clone() for name, tensor in attention.state_dict().items()}
    seen = len(inputs) - unseen
    _train(attention, inputs[:seen], targets[:seen], position_embeddings, steps=steps, rows=rows, seed=seed)
    if not _error(attention, inputs[judge], targets[judge], position_embeddings) < before:
        attention.load_state_dict(original)


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
    *,
    steps: int,
    rows: int,
    seed: int,
) -> None:
    parameters = [p for p in attention.parameters() if p.numel()]
    for parameter in parameters:
        parameter.requires_grad_(True)
    groups = [{"params": [p], "lr": LEARNING_RATE * _scale(p)} for p in parameters]
    optimiser = torch.optim.Adam(groups, betas=BETAS)
    peaks = [group["lr"] for group in optimiser.param_groups]
    device = position_embeddings[0].device
    batches = _batches(len(inputs), rows, torch.Generator().manual_seed(seed))
    for step in range(steps):
        rate = min(1.0, (step + 1) / WARMUP) * 0.5 * (1 + math.cos(math.pi * step / steps))
        for group, peak in zip(optimiser.param_groups, peaks, strict=True):
            group["lr"] = peak * rate
        batch = next(batches)
        expected = targets[batch].to(device)
        with torch.enable_grad():
            output = attention(inputs[batch].to(device), position_embeddings)[0]
            loss = (output - expected).square().sum() / expected.square().sum()
            loss.backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
    for parameter in parameters:
        parameter.requires_grad_(False)


def _scale(parameter: Tensor) -> float:
    """RMS of a tensor, with a floor for one that starts at zero."""
    return max(parameter.detach().square().mean().sqrt().item(), 1e-4)


def _batches(count: int, rows: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Endless batches of row indices; every row once before any comes again."""
    while True:
        order = torch.randperm(count, generator=generator)
        yield from order.split(min(rows, count))
