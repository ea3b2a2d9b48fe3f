"""A donor's attention with a window and sinks, as the pass over the layers runs it; nothing of this is shipped.

The stock classes get the window from a mask that their model makes; a layer on its own has none.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .surgery import SinkFit, dropped, windowed

IMPLEMENTATION = "mhconvert_window"


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, _: Any, scaling: float, **options: Any
) -> tuple[Tensor, None]:
    """The attention function of transformers for `windowed_attention`; the mask is made here."""
    softcap = options.get("softcap")
    if module.window is None and softcap is None:
        whole = scaled_dot_product_attention(
            query, key, value, scale=scaling, is_causal=True, enable_gqa=query.shape[1] != key.shape[1]
        )
        return whole.transpose(1, 2).contiguous(), None
    heads, sums = windowed(query, key, value, module.window or query.shape[2], scaling, softcap)
    if module.seen is not None:
        lost = dropped(query, key, sums, module.window, scaling) if query.shape[2] > module.window else None
        module.seen.append((heads, sums, lost))
    if module.sinks is not None and module.window is not None:
        heads = heads * (sums - module.sinks).sigmoid()[..., None]
    return heads.contiguous(), None


ALL_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, _attend)


def windowed_attention(attention: Any, window: int | None) -> Any:
    """A copy of a donor's attention that sees `window` tokens, or all before it, whatever mask it is given."""
    module = copy.deepcopy(attention)
    module.config = copy.copy(attention.config)
    module.config._attn_implementation = IMPLEMENTATION
    module.window, module.sinks, module.seen = window, None, None
    forward = module.forward

    def without_mask(
        hidden_states: Tensor, position_embeddings: Any, attention_mask: Any = None, **options: Any
    ) -> Any:
        return forward(hidden_states, position_embeddings, attention_mask=None, **options)

    module.forward = without_mask
    return module


@torch.no_grad()
def fitted_sinks(
    module: Any, inputs: Tensor, targets: Tensor, position_embeddings: tuple[Tensor, Tensor]
) -> Tensor:
    """The sinks (H,) of a `windowed_attention` with which it is nearest to the donor's, float64.

    They start as the mean logarithm of the mass that the window drops.

    Args:
        inputs, targets: (N, L, D), what the donor's attention reads and returns.
    """
    fit, starts = SinkFit(), []
    output = module.o_proj.weight.unflatten(1, (-1, module.head_dim))
    bias = module.o_proj.bias
    for row, wanted in zip(inputs.split(1), targets.split(1), strict=True):
        module.seen = []
        module(row.to(output.device), position_embeddings)
        [(heads, sums, lost)] = module.seen
        wanted = wanted[0].to(output.device)
        fit.add(heads[0], sums[0], output, wanted if bias is None else wanted - bias)
        starts.append(lost[0].mean(0))
    module.seen = None
    return fit.solve(torch.stack(starts).mean(0).cpu())


def with_sinks(attention: nn.Module, sinks: Tensor) -> nn.Module:
    """`attention` with the parameter `sinks` (H,), as granite_swa stores it."""
    attention.sinks = nn.Parameter(sinks.to(next(attention.parameters())), requires_grad=False)
    return attention
