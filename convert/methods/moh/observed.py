"""What MoH conversions of a donor layer need of it: its attention, and what each of its heads adds to a token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .modeling_moh import MixtureOfHeadAttention
from .surgery import RoutingStatistics

STEP_TOKENS = 4096  # tokens per forward pass


@dataclass(frozen=True)
class Observed:
    """What conversions of one donor layer read, the same for every budget.

    Attributes:
        attention: the donor's module, float32.
        statistics: sums over the calibration text.
    """

    attention: nn.Module
    statistics: RoutingStatistics


@torch.no_grad()
def observe(
    attention: Any,
    config: Any,
    inputs: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    routed: Any = MixtureOfHeadAttention,
) -> Observed:
    """The donor's `attention` and what its units (heads, or groups of them) add to the tokens of `inputs`.

    Args:
        config: of the converted class with all heads active, which says what a unit is.
        inputs: (N, L, D), what the attention reads on calibration text.
        position_embeddings: (cos, sin), each (1, L, rotary width).
        routed: the converted attention's class.
    """
    index, device = attention.layer_idx, position_embeddings[0].device
    whole = routed(attention, config, index)
    units, width = config.routing_units, whole.heads * whole.head_dim // config.routing_units
    weight = whole.o_proj.weight.float().unflatten(1, (units, width))  # D U w
    metric = torch.einsum("duw,duv->uwv", weight, weight)
    statistics = RoutingStatistics.empty(inputs.shape[-1], units)
    outputs: list[Tensor] = []
    hook = whole.o_proj.register_forward_pre_hook(lambda _, arguments: outputs.append(arguments[0]))
    for rows in inputs.split(max(1, STEP_TOKENS // inputs.shape[1])):
        x = rows.to(device)
        whole(x, position_embeddings)
        heads = outputs.pop().float().unflatten(-1, (units, width)).flatten(0, 1)
        energies = torch.einsum("nuw,uwv,nuv->nu", heads, metric, heads)
        queries = whole.projections(x)[0].float().unflatten(-1, (units, -1)).flatten(0, 1)
        statistics.add(x.flatten(0, 1), energies, queries.square().sum(-1))
    hook.remove()
    return Observed(attention, statistics)
