"""Measures what errors in each layer's keys and values cost the donor's predictions: one pass forward, one backward.

Tokens are drawn from the donor's own predictions, and the gradient of their log-probability is taken to every key and
value: its second moment is the Fisher information, from which a small error's divergence follows. Both passes hold one
layer at a time.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mhconvert.device import half_products
from mhconvert.progress import Progress

from ..attention.half_attention import half_layers
from ..families.facts import attention_facts
from ..methods.layer_sensitivity import FIRST_TOKENS, SAMPLE_TOKENS, LayerMoments
from . import layer_steps
from .backward import back_through, gradients_of_samples
from .context import ConversionContext
from .stored_sensitivities import MomentFiles, Sensitivities, moments_of

WANTED_PER_ELEMENT = 20  # tokens for each element of a layer's keys and values, which few_tokens names
MOST_PER_ELEMENT = 80  # that are read: twice as many make the divergence less than 1 % smaller
FEW_PER_ELEMENT = 2  # below it the transform fits the text that it was made from
PASS_TOKENS = 8192  # that go through the layers at once, at most
# Of their states: 1.25 GiB, or what a layer's weights and a third have in float32, about 12 D² elements each. Every
# pass reads all layers twice, so that a large donor should not have many.
LEAST_STATE_BYTES, LAYER_SQUARES = 5 << 28, 16
ROW_TOKENS = 512
# Beside the layers' inputs: the gradients behind a layer and before it.
STATE_COPIES = 2
PART_COPIES, SQUARE_COPIES = 6, 4  # of keys, values and gradients, and of their products, float64


def measure_sensitivities(context: ConversionContext, folder: Path | None = None) -> Sensitivities:
    """The sensitivity of every layer, on the CPU.

    folder: a new one for their files, of which one layer's is in memory at a time; None: all are in memory.
    """
    elements = attention_facts(context.donor.config).kv_elements
    rows = surveyed_rows(context.rows.fit, elements)
    tokens = pass_tokens(context.layers, context.donor.config.hidden_size)
    passes = rows.split(max(1, tokens // rows.shape[1]))
    moments = moments_of(context.layers, elements, folder)
    generator = torch.Generator().manual_seed(context.recipe.seed)
    steps, total = itertools.count(1), 2 * context.layers * len(passes) + len(rows)
    notice = few_tokens(rows.numel(), elements)
    context.on_progress(Progress("survey", 0, total, notice))
    for part in passes:
        for _ in _one_pass(context, part, generator, moments):
            context.on_progress(Progress("survey", next(steps), total))
    context.on_progress(Progress("survey", total, total, notice))
    return Sensitivities(moments)


def surveyed_rows(rows: Tensor, elements: int) -> Tensor:
    """The calibration rows (N, L) as a survey reads them: longer ones in pieces, the first pieces of all rows first."""
    count, length = surveyed_shape(len(rows), rows.shape[1], elements)
    pieces = torch.cat([piece for piece in rows.split(length, dim=1) if piece.shape[1] == length])
    return pieces[:count]


def surveyed_shape(rows: int, length: int, elements: int) -> tuple[int, int]:
    """How many rows of how many tokens a survey makes of `rows` rows of `length`: long rows are cut.

    elements: m, of a layer's keys and values.
    """
    cut = min(ROW_TOKENS, length)
    return min(rows * (length // cut), -(-MOST_PER_ELEMENT * elements // cut)), cut


def pass_tokens(layers: int, hidden: int) -> int:
    """How many tokens go through the layers at once: the states at every layer's input are kept."""
    most = max(LEAST_STATE_BYTES, 4 * LAYER_SQUARES * hidden**2)
    return min(PASS_TOKENS, max(ROW_TOKENS, most // _state_bytes(layers, hidden)))


def _state_bytes(layers: int, hidden: int) -> int:
    """Of one token."""
    return 4 * (layers + STATE_COPIES) * hidden


def stored_bytes(elements: int, layers: int, rows: int, length: int) -> int:
    """Bytes of what a survey of `rows` rows of `length` tokens finds, in its files."""
    kept = min(SAMPLE_TOKENS, rows * (length - FIRST_TOKENS))
    return layers * (8 * (2 * elements + elements**2 + 2) + 4 * elements * (elements + kept))


def peak_bytes(elements: int, layers: int, hidden: int, rows: int, length: int) -> int:
    """Memory of a survey of `rows` rows of `length` tokens, without a layer's weights and the logits of a row.

    The states at each layer's input are those of one pass. What is found of a layer is there twice when it is written.
    """
    tokens = min(rows * length, pass_tokens(layers, hidden))
    states = tokens * _state_bytes(layers, hidden)
    part = 8 * (PART_COPIES * tokens * elements + SQUARE_COPIES * elements**2)
    return 2 * stored_bytes(elements, 1, rows, length) + states + part


def few_tokens(tokens: int, elements: int) -> str:
    """A sentence for the user where a survey of so many tokens is too small for its moments, else ""."""
    if tokens >= FEW_PER_ELEMENT * elements:
        return ""
    return (
        f"{tokens:,} tokens are few for the {elements:,} elements of keys and values in a layer; "
        f"{WANTED_PER_ELEMENT * elements:,} are wanted (--calibration-tokens)"
    )


def _one_pass(
    context: ConversionContext,
    rows: Tensor,
    generator: torch.Generator,
    moments: list[LayerMoments] | MomentFiles,
) -> Iterator[None]:
    """Count rows (N, L) in the moments of every layer; yields behind each layer forward, each row's predictions, and
    each layer backward.
    """
    hidden, inputs = context.donor.embed(rows), []
    context.donor.release()
    for index in range(context.layers):
        inputs.append(hidden)
        layer = layer_steps.read_layer(context, index, rows.shape[1])
        block = layer.block(layer.attention, nn.Identity())
        with half_layers(context.device):
            hidden = layer.through(lambda x, block=block: block(x, None)[0], hidden)
        yield
    gradient = torch.empty_like(hidden)
    for row, behind in zip(hidden, gradient, strict=True):
        with half_products(context.device):
            behind.copy_(gradients_of_samples(context, row, generator)[0])
        yield
    context.donor.release()
    for index in reversed(range(context.layers)):
        values, gradients, gradient = _through_layer(context, index, inputs.pop(), gradient)
        gathered = moments[index]
        gathered.begin(values[:, 0])
        gathered.add(*(part[:, FIRST_TOKENS:].flatten(0, 1) for part in (values, gradients)))
        moments[index] = gathered
        yield


def _through_layer(
    context: ConversionContext, index: int, hidden: Tensor, gradient: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """One layer's keys and values (N, L, m), the gradients at them (N, L, m), and the gradient at its input.

    Args:
        hidden: (N, L, D), the layer's input; gradient: (N, L, D), at its output.
    """
    layer = layer_steps.read_layer(context, index, hidden.shape[1])
    written: list[tuple[Tensor, Tensor]] = []
    with _key_value_projections(layer.attention, context.donor.config) as read:
        [before] = back_through(context, layer, hidden, gradient[None], lambda: written.append(read()))
    values, gradients = (torch.cat(parts) for parts in zip(*written, strict=True))
    return values, gradients, before


@contextmanager
def _key_value_projections(attention: Any, config: Any) -> Iterator[Any]:
    """A function that returns the keys before RoPE and values [k; v] of the last rows, and the gradient at them.

    Both are (N, L, m), on the CPU.
    """
    facts = attention_facts(config)
    fused = hasattr(attention, "qkv_proj")
    keys = attention.k_norm if facts.qk_norm is not None else getattr(attention, "k_proj", None)
    modules = [attention.qkv_proj] if fused else [keys, attention.v_proj]
    names = ("qkv_proj", "k_proj", "v_proj", "k_norm")
    exact = [getattr(attention, name) for name in names if hasattr(attention, name)]
    outputs: list[Tensor] = []

    def keep(_: nn.Module, __: Any, output: Tensor) -> None:
        output.retain_grad()
        outputs.append(output)

    def flat(x: Tensor) -> Tensor:
        """(N, L, width), from that or from a norm's heads (N, L, G, d) or (N, G, L, d)."""
        if x.dim() == 4 and x.shape[1] == facts.kv_heads and x.shape[2] != facts.kv_heads:
            x = x.transpose(1, 2)
        return x.flatten(2)

    def read() -> tuple[Tensor, Tensor]:
        values, gradients = ([flat(getattr(o, name)) for o in outputs] for name in ("data", "grad"))
        outputs.clear()
        joined = (torch.cat(parts, dim=-1)[..., -facts.kv_elements :] for parts in (values, gradients))
        keys_values, at_them = (part.cpu() for part in joined)
        return keys_values, at_them

    hooks = [module.register_forward_hook(keep) for module in modules]
    for module in exact:
        module.forward = _without_half_products(module.forward)
    try:
        yield read
    finally:
        for hook in hooks:
            hook.remove()
        for module in exact:
            del module.forward


def _without_half_products(forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """`forward` in the weights' own dtype: of what hardly varies, rounding would be most of the covariance.

    What it reads went through earlier layers with half products.
    """

    def exact(x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return forward(x)

    return exact
