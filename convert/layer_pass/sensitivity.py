"""Measures what errors in each layer's keys and values cost the donor's predictions: one pass forward, one backward.

Tokens are drawn from the donor's own predictions, and the gradient of their log-probability is taken to every key and
value: its second moment is the Fisher information, from which a small error's divergence follows. Both passes hold one
layer at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mhconvert.progress import Progress

from ..families.facts import attention_facts
from ..methods.layer_sensitivity import LayerSensitivity
from . import layer_steps
from .context import ConversionContext

TOKENS = 8192  # of the calibration text
ROW_TOKENS = 512
CLIPPED = 0.98  # quantile of the gradients' norms over tokens at which they are clipped: a few would be most of the sum
FIRST_TOKENS = 4  # of each row, which are left out of the moments: models park their attention on them


def measure_sensitivities(context: ConversionContext) -> list[LayerSensitivity]:
    """The sensitivity of every layer, float64 on the CPU."""
    rows = context.rows.fit[:, :ROW_TOKENS]
    rows = rows[: max(1, TOKENS // rows.shape[1])]
    total = 2 * context.layers
    hidden, inputs = context.donor.embed(rows), []
    for index in range(context.layers):
        context.on_progress(Progress("survey", index, total))
        inputs.append(hidden)
        layer = layer_steps.read_layer(context, index, rows.shape[1])
        block = layer.block(layer.attention, nn.Identity())
        hidden = layer.through(lambda x, block=block: block(x, None)[0], hidden)
    gradient = _gradient_of_samples(context, hidden)
    sensitivities = []
    for index in reversed(range(context.layers)):
        context.on_progress(Progress("survey", total - 1 - index, total))
        sensitivity, gradient = _through_layer(context, index, inputs.pop(), gradient)
        sensitivities.append(sensitivity)
    context.donor.release()
    context.on_progress(Progress("survey", total, total))
    return sensitivities[::-1]


def _gradient_of_samples(context: ConversionContext, hidden: Tensor) -> Tensor:
    """∂ log p(tokens drawn from the donor's predictions) / ∂ hidden, (N, L, D), behind the last layer."""
    generator = torch.Generator().manual_seed(context.recipe.seed)
    gradients = []
    for row in hidden:
        leaf = row.to(context.device).requires_grad_()
        with torch.enable_grad():
            log_probabilities = context.donor.head(leaf).log_softmax(-1)
            drawn = torch.multinomial(log_probabilities.detach().exp().cpu(), 1, generator=generator)
            log_probabilities.gather(-1, drawn.to(leaf.device)).sum().backward()
        assert leaf.grad is not None
        gradients.append(leaf.grad.cpu())
    return torch.stack(gradients)


def _through_layer(
    context: ConversionContext, index: int, hidden: Tensor, gradient: Tensor
) -> tuple[LayerSensitivity, Tensor]:
    """One layer's sensitivity, and the gradient at its input.

    Args:
        hidden: (N, L, D), the layer's input; gradient: (N, L, D), at its output.
    """
    layer = layer_steps.read_layer(context, index, hidden.shape[1])
    block = layer.block(layer.attention, nn.Identity())
    before, written = [], []
    with _key_value_projections(layer.attention, context.donor.config) as read:
        for row, behind in zip(hidden.split(1), gradient.split(1), strict=True):
            leaf = row.to(context.device).requires_grad_()
            with torch.enable_grad():
                block(leaf, None)[0].backward(behind.to(context.device))
            assert leaf.grad is not None
            before.append(leaf.grad.cpu())
            written.append(read())
    values, gradients = (torch.cat(parts).double() for parts in zip(*written, strict=True))
    return layer_sensitivity(values, gradients), torch.cat(before)


def layer_sensitivity(values: Tensor, gradients: Tensor) -> LayerSensitivity:
    """The moments of keys and values (tokens, m) and of the gradients at them (tokens, m)."""
    sizes = gradients.square().sum(-1)
    shrunk = sizes.quantile(CLIPPED) / sizes.clamp_min(torch.finfo(sizes.dtype).tiny)
    gradients = gradients * shrunk.clamp_max(1).sqrt().unsqueeze(-1)
    count = len(values)
    return LayerSensitivity(values.mean(0), values.mT @ values / count, gradients.mT @ gradients / count)


@contextmanager
def _key_value_projections(attention: Any, config: Any) -> Iterator[Any]:
    """A function that returns the keys before RoPE and values [k; v] of the last row, and the gradient at them.

    Both are (L − FIRST_TOKENS, m), float32 on the CPU.
    """
    facts = attention_facts(config)
    key_value = 2 * facts.kv_heads * facts.head_dim
    fused = hasattr(attention, "qkv_proj")
    keys = attention.k_norm if facts.qk_norm is not None else getattr(attention, "k_proj", None)
    modules = [attention.qkv_proj] if fused else [keys, attention.v_proj]
    outputs: list[Tensor] = []

    def keep(_: nn.Module, __: Any, output: Tensor) -> None:
        output.retain_grad()
        outputs.append(output)

    def flat(x: Tensor) -> Tensor:
        """(1, L, width), from that or from a norm's heads (1, L, G, d) or (1, G, L, d)."""
        if x.dim() == 4 and x.shape[1] == facts.kv_heads and x.shape[2] != facts.kv_heads:
            x = x.transpose(1, 2)
        return x.flatten(2)

    def read() -> tuple[Tensor, Tensor]:
        values, gradients = ([flat(getattr(o, name)) for o in outputs] for name in ("data", "grad"))
        outputs.clear()
        joined = (torch.cat(parts, dim=-1)[0, FIRST_TOKENS:, -key_value:] for parts in (values, gradients))
        keys_values, at_them = (part.cpu() for part in joined)
        return keys_values, at_them

    hooks = [module.register_forward_hook(keep) for module in modules]
    try:
        yield read
    finally:
        for hook in hooks:
            hook.remove()
