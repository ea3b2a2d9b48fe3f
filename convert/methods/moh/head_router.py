"""What chooses a token's heads.

This file is shipped inside converted checkpoints: it imports torch and its siblings only. Shapes: B batch, T tokens, H
query heads, d head_dim, D hidden_size; U routing units (heads, or groups of them), of which R are routed.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class FloatLinear(nn.Linear):
    """A linear map in float32, whatever its weights are kept in: a choice must not hang on bfloat16's rounding."""

    def forward(self, input: Tensor) -> Tensor:
        with torch.autocast(input.device.type, enabled=False):
            bias = None if self.bias is None else self.bias.float()
            return F.linear(input.float(), self.weight.float(), bias)


class HeadRouter(nn.Module):
    """Which units each token has: the shared ones, and of the routed ones those with the highest scores.

    Only of a layer that has something to choose (MoH, arXiv 2410.11842, sections 3.2 and 4.3). "norm": no parameters.
    In training the gradient of a gate is taken for that of its score, chosen or not, if `straight_through`.
    "learned": `score` (D -> R) chooses, and the coefficients of the two stages, α of `maps.stage` and those of
    `maps.shared` and `maps.routed`, are relative: where these are zero every chosen unit has a gate of exactly 1.
    """

    def __init__(self, config: Any, layer_idx: int):
        super().__init__()
        self.shared_units, self.routed_units, self.chosen = config.layer_routing(layer_idx)
        self.units, self.learned = config.routing_units, config.head_router == "learned"
        self.straight_through, self.norm_scale, self.norm_offset = True, None, None
        if self.learned:
            width, routed, shared = config.hidden_size, len(self.routed_units), len(self.shared_units)
            self.score = FloatLinear(width, routed)
            # The coefficient of a single head is 1, and without shared heads there is one stage.
            sizes = {
                "routed": routed * (self.chosen > 1),
                "shared": shared * (shared > 1),
                "stage": 2 * (shared > 0),
            }
            maps = {name: FloatLinear(width, size, bias=False) for name, size in sizes.items() if size}
            self.maps = nn.ModuleDict(maps)
        elif config.norm_scale is not None:
            self.norm_scale, self.norm_offset = config.norm_scale[layer_idx], config.norm_offset[layer_idx]
        self.last: tuple[Tensor, Tensor] | None = None  # of a forward pass in training

    def forward(self, hidden_states: Tensor, query: Tensor) -> tuple[Tensor, Tensor | None]:
        """hidden_states [B, T, D], query [B, T, H d] before norm and rotation -> which units are active [B, T, U], and
        their gates, 0 where they are not; None: all 1.
        """
        scores = self.score(hidden_states) if self.learned else self.norms(query)
        # Of equal scores the first unit has precedence, however many tokens are read together.
        order = scores.sort(dim=-1, descending=True, stable=True).indices
        chosen = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, order[..., : self.chosen], True)
        active = self.spread(chosen, torch.ones_like(chosen[..., :1]))
        if self.training:
            probability = scores.softmax(-1) if self.straight_through else scores.softmax(-1).detach()
            self.last = probability, chosen
            routed = chosen.to(scores.dtype) + (probability - probability.detach())  # the value is 0 or 1
            gates = self.spread(routed, torch.ones_like(routed[..., :1]))
        else:
            gates = active.to(scores.dtype)
        if not self.learned:
            return active, gates if self.training else None
        with torch.set_grad_enabled(
            self.training and torch.is_grad_enabled()
        ):  # a layer's fit leaves gates at 1
            return active, gates * self.coefficients(hidden_states, chosen)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"last": None}  # a graph is not copied

    def norms(self, query: Tensor) -> Tensor:
        """[B, T, H d] -> [B, T, R], float32: ‖q‖ of each routed unit, by its logarithm."""
        squares = query.float().unflatten(-1, (self.units, -1)).square().sum(-1)
        scores = squares.clamp_min(torch.finfo(squares.dtype).tiny).log() / 2
        scores = scores[..., torch.tensor(self.routed_units, device=scores.device)]
        if self.norm_scale is None:
            return scores
        return scores * scores.new_tensor(self.norm_scale) + scores.new_tensor(self.norm_offset)

    def coefficients(self, hidden_states: Tensor, chosen: Tensor) -> Tensor:
        """[B, T, U]: of mean 1 among the shared units and among the chosen ones, and the two stages' α around it."""
        maps, one = self.maps, chosen.new_ones(1, dtype=torch.float32).expand(*chosen.shape[:-1], 1)
        routed, shared = one.expand(chosen.shape), one
        if "routed" in maps:
            routed = self.relative(
                maps["routed"](hidden_states).masked_fill(~chosen, -torch.inf), self.chosen
            )
        if "shared" in maps:
            shared = self.relative(maps["shared"](hidden_states), len(self.shared_units))
        if "stage" in maps:
            first, second = self.relative(maps["stage"](hidden_states), 2).split(1, -1)
            routed, shared = routed * second, shared * first
        return self.spread(routed, shared)

    @staticmethod
    def relative(weights: Tensor, count: int) -> Tensor:
        """`count` times the softmax; exactly 1 for equal weights."""
        powers = (weights - weights.amax(-1, keepdim=True)).exp()
        return powers * (count / powers.sum(-1, keepdim=True))

    def spread(self, routed: Tensor, shared: Tensor) -> Tensor:
        """[B, T, R] and [B, T, shared or 1] -> [B, T, U]."""
        shared = shared.expand(*routed.shape[:-1], len(self.shared_units))
        places = torch.tensor([*self.routed_units, *self.shared_units], device=routed.device).argsort()
        return torch.cat((routed, shared), dim=-1)[..., places]
