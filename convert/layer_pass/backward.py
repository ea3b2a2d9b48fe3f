"""The steps of a backward pass through the donor, which holds one layer at a time.

It starts from tokens that are drawn from the donor's own predictions, so that the second moment of a gradient of their
log-probability is the Fisher information.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..attention.half_attention import half_layers
from ..calibration.token_rows import random_ids
from .context import ConversionContext
from .decoder_layer import Layer

STEP_TOKENS = 1024  # that go through a layer with its gradients at once


def gradients_of_samples(
    context: ConversionContext, hidden: Tensor, generator: torch.Generator, samples: int = 1
) -> Tensor:
    """∂ log p(tokens drawn from the donor's predictions) / ∂ hidden, (samples, L, D) on the device.

    hidden: (L, D), behind the last layer.
    """
    leaf = hidden.to(context.device).requires_grad_()
    with torch.enable_grad():
        logits = context.donor.head(leaf)
    probabilities = logits.detach().float().softmax(-1)
    ids = random_ids(probabilities, generator, samples)
    behind = probabilities.neg_()
    gradients: list[Tensor] = []
    for sample in ids.split(1, dim=1):
        behind.scatter_add_(-1, sample, torch.ones_like(behind[:, :1]))
        gradients += torch.autograd.grad(logits, leaf, behind.to(logits), retain_graph=True)
        behind.scatter_add_(-1, sample, behind.new_full((len(behind), 1), -1.0))
    return torch.stack(gradients)


def back_through(
    context: ConversionContext,
    layer: Layer,
    hidden: Tensor,
    gradients: Tensor,
    after_step: Callable[[], object] = lambda: None,
) -> Tensor:
    """The gradients (samples, N, L, D) at the input of `layer`, on the CPU.

    Args:
        hidden: (N, L, D), the layer's input; gradients: (samples, N, L, D), at its output.
        after_step: called whenever some of the rows, in their order, have gone through.
    """
    block = layer.block(layer.attention, nn.Identity())
    found = torch.empty_like(gradients)
    rows = max(1, STEP_TOKENS // hidden.shape[1])
    parts = zip(hidden.split(rows), gradients.split(rows, dim=1), found.split(rows, dim=1), strict=True)
    for part, behind, before in parts:
        leaf = part.to(context.device).requires_grad_()
        with torch.enable_grad(), half_layers(context.device):
            output = block(leaf, None)[0]
        for number, (sample, target) in enumerate(zip(behind, before, strict=True), start=1):
            output.backward(sample.to(output), retain_graph=number < len(behind))
            assert leaf.grad is not None
            target.copy_(leaf.grad)
            leaf.grad = None
        after_step()
    return found
