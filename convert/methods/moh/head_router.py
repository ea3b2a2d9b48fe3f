"""What chooses a token's heads.

This file is shipped inside converted checkpoints: it imports torch and its siblings only. Shapes: B batch, T tokens, H
query heads, d head_dim, D hidden_size; U routing units (heads, or groups of them), of which R are routed.
"""

import math
from operator import add
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

KEPT: dict[tuple[tuple[float, ...], torch.dtype, torch.device], Tensor] = {}


def constant(values: tuple[float, ...], like: Tensor, dtype: torch.dtype = torch.int64) -> Tensor:
    """`values` on the device of `like`, made once for each: no buffer, so that neither checkpoints nor casts know it.

    A graph that is compiled has its own, and so has a run without real tensors.
    """
    if torch.compiler.is_compiling() or type(like) is not Tensor:
        return torch.tensor(values, dtype=dtype, device=like.device)
    name = values, dtype, like.device
    if name in KEPT:
        return KEPT[name]
    with torch.inference_mode(False):  # a later call may need gradients
        made = torch.tensor(values, dtype=dtype, device=like.device)
    if type(made) is Tensor:
        KEPT[name] = made
    return made


class FloatLinear(nn.Linear):
    """A linear map in float32, whatever its weights are kept in: a choice must not hang on bfloat16's rounding."""

    def forward(self, input: Tensor) -> Tensor:
        return float_linear(input, self.weight, self.bias)

    def is_plain(self) -> bool:
        """Whether it does what its weights say: no adapter, hook or offload."""
        hooked = self._forward_hooks or self._forward_pre_hooks or {"_hf_hook", "forward"} & vars(self).keys()
        return type(self) is FloatLinear and type(self.weight) is nn.Parameter and not hooked


def float_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear` in float32, also where autocast is on."""
    given = x.float(), weight.float(), None if bias is None else bias.float()
    if not torch.is_autocast_enabled(x.device.type):
        return F.linear(*given)
    with torch.autocast(x.device.type, enabled=False):
        return F.linear(*given)


def is_one_token(x: Tensor) -> bool:
    """Whether x [B, T, n] is of one token and its numbers can be had at once: on a CPU, and no graph is made."""
    return (
        x.shape[:2] == (1, 1)
        and x.device.type == "cpu"
        and type(x) is Tensor
        and not torch.compiler.is_compiling()
    )


def softmax(logits: list[float]) -> list[float]:
    """Of one number or more."""
    most = max(logits)
    powers = [math.exp(logit - most) for logit in logits]
    total = sum(powers)
    return [power / total for power in powers]


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
            sizes = {name: size for name, size in sizes.items() if size}
            maps = {name: FloatLinear(width, size, bias=False) for name, size in sizes.items()}
            self.maps, self.sizes = nn.ModuleDict(maps), [routed, *sizes.values()]
            starts = [sum(self.sizes[:i]) for i in range(len(self.sizes))]
            self.spans = dict(zip(("score", *maps), zip(starts, self.sizes, strict=True), strict=True))
            self.stages = tuple(int(unit in self.routed_units) for unit in range(self.units))
            counts = len(self.shared_units), self.chosen
            # Each unit's share where the coefficients are equal.
            self.equal = tuple(1 / counts[stage] / (2 if shared else 1) for stage in self.stages)
        elif config.norm_scale is not None:
            lists = config.norm_scale[layer_idx], config.norm_offset[layer_idx]
            self.norm_scale, self.norm_offset = map(tuple, lists)
        stored = [*self.routed_units, *self.shared_units]
        self.places = tuple(stored.index(unit) for unit in range(self.units))
        self.last: tuple[Tensor, Tensor] | None = None  # of a forward pass in training

    def forward(self, hidden_states: Tensor, query: Tensor) -> tuple[Tensor, Tensor | None]:
        """hidden_states [B, T, D], query [B, T, H d] before norm and rotation -> which units are active [B, T, U], and
        their gates, 0 where they are not; None: all 1.
        """
        joined = self.joined(hidden_states) if self.learned else None
        if joined is not None and not self.training and is_one_token(joined):
            gates = joined.new_tensor([[self.gates_of_token(joined.flatten().tolist())]])
            return gates != 0, gates
        read = self.mapped(hidden_states, joined) if self.learned else {"score": self.norms(query)}
        scores = read["score"]
        # Of equal scores the first unit has precedence, however many tokens are read together.
        order = scores.sort(dim=-1, descending=True, stable=True).indices[..., : self.chosen]
        chosen = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order, True)
        if self.training:
            active = self.spread(chosen)
            probability = scores.softmax(-1) if self.straight_through else scores.softmax(-1).detach()
            self.last = probability, chosen
            routed = chosen.to(scores.dtype) + (probability - probability.detach())  # the value is 0 or 1
            gates = self.spread(routed)
            return active, gates * self.coefficients(read, chosen) if self.learned else gates
        if not self.learned:
            return self.spread(chosen), None
        with torch.no_grad():  # a layer's fit leaves gates at 1
            gates = self.coefficients(read, chosen)
            gates = gates if "routed" in self.maps else gates * self.spread(chosen)
            return gates != 0, gates

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"last": None}  # a graph is not copied

    def norms(self, query: Tensor) -> Tensor:
        """[B, T, H d] -> [B, T, R], float32: ‖q‖ of each routed unit, by its logarithm."""
        squares = query.float().unflatten(-1, (self.units, -1)).square().sum(-1)
        scores = squares.clamp_min(torch.finfo(squares.dtype).tiny).log() / 2
        if self.shared_units:
            scores = scores.index_select(-1, constant(tuple(self.routed_units), scores))
        if self.norm_scale is None or self.norm_offset is None:
            return scores
        scale, offset = (constant(each, scores, scores.dtype) for each in (self.norm_scale, self.norm_offset))
        return scores * scale + offset

    def joined(self, hidden_states: Tensor) -> Tensor | None:
        """What the weights of `score` and of `maps` make of [B, T, D], float32, in one product; None: one is more than
        its weight.
        """
        parts: list[Any] = [self.score, *self.maps.values()]
        if not all(type(part) is FloatLinear and part.is_plain() for part in parts):
            return None
        return float_linear(hidden_states, torch.cat([part.weight for part in parts]), None)

    def mapped(self, hidden_states: Tensor, joined: Tensor | None) -> dict[str, Tensor]:
        """What `score` and each of `maps` make of [B, T, D], float32."""
        if joined is None:
            return {"score": self.score(hidden_states)} | {
                n: part(hidden_states) for n, part in self.maps.items()
            }
        score, *others = joined.split_with_sizes(self.sizes, dim=-1)
        return {"score": score + self.score.bias.float()} | dict(zip(self.maps, others, strict=True))

    def gates_of_token(self, read: list[float]) -> list[float]:
        """The choice of a single token and its `coefficients`, from `joined`: the gates of U units, 0: not active.

        The dozen operations on tensors that it stands for take several times as long.
        """
        part = {name: read[start : start + size] for name, (start, size) in self.spans.items()}
        scores = list(map(add, part["score"], self.score.bias.tolist()))
        best = sorted(range(len(scores)), key=scores.__getitem__, reverse=True)[: self.chosen]  # stable
        logits = part.get("routed", scores)  # of a single one the share is 1
        active = [([self.routed_units[i] for i in best], softmax([logits[i] for i in best]))]
        if self.shared_units:
            active.insert(0, (self.shared_units, softmax(part.get("shared", [0.0]))))
        gates = [0.0] * self.units
        for (units, shares), stage in zip(active, softmax(part.get("stage", [0.0])), strict=True):
            for unit, share in zip(units, shares, strict=True):
                gates[unit] = share * stage / self.equal[unit]
        return gates

    def coefficients(self, read: dict[str, Tensor], chosen: Tensor) -> Tensor:
        """[B, T, U]: of mean 1 among the shared units and among the chosen ones, and the two stages' α around it."""
        shared = None
        if "routed" in read:
            routed = torch.where(chosen, read["routed"], -torch.inf).softmax(-1)
        else:
            routed = torch.ones_like(chosen, dtype=torch.float32)
        if "shared" in read:
            shared = read["shared"].softmax(-1)
        shares = self.spread(routed, shared)
        if "stage" in read:
            stage = read["stage"].softmax(-1)
            shares = shares * stage.index_select(-1, constant(self.stages, stage))
        # A quotient of equal numbers is exactly 1; a product with the number of units is not, for 41 of them.
        return shares / constant(self.equal, shares, shares.dtype)

    def spread(self, routed: Tensor, shared: Tensor | None = None) -> Tensor:
        """[B, T, R] and [B, T, shared], None: 1 -> [B, T, U]."""
        if not self.shared_units:
            return routed
        if shared is None:
            whole = F.pad(routed, (0, len(self.shared_units)), value=1)
        else:
            whole = torch.cat((routed, shared), dim=-1)
        return whole.index_select(-1, constant(self.places, whole))
