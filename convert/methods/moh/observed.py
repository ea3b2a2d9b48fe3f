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
        outputs: (N, L, D) float32 on the CPU, what the attention returns for it; None where it has a window within L.
    """

    attention: nn.Module
    statistics: RoutingStatistics
    outputs: Tensor | None


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
    statistics, outputs = RoutingStatistics.empty(inputs.shape[-1], units), torch.empty_like(inputs)
    seen: dict[str, Tensor] = {}
    hook = whole.o_proj.register_forward_pre_hook(lambda _, arguments: seen.update(heads=arguments[0]))
    projections = whole.projections

    def kept_queries(x: Tensor) -> tuple[Tensor, ...]:
        found = projections(x)
        seen["queries"] = found[0]
        return found

    whole.projections = kept_queries
    step = max(1, STEP_TOKENS // inputs.shape[1])
    for rows, target in zip(inputs.split(step), outputs.split(step), strict=True):
        x = rows.to(device)
        target.copy_(whole(x, position_embeddings)[0])
        if "queries" not in seen:  # latents make them in a part of their own
            seen["queries"] = projections(x)[0]
        heads, queries = (
            seen.pop(name).float().unflatten(-1, (units, -1)).flatten(0, 1) for name in ("heads", "queries")
        )
        energies = torch.einsum("nuw,uwv,nuv->nu", heads, metric, heads)
        statistics.add(x.flatten(0, 1), energies, queries.square().sum(-1))
    hook.remove()
    windowed = whole.window is not None and whole.window < inputs.shape[1]  # which is not masked here
    return Observed(attention, statistics, None if windowed else outputs)
