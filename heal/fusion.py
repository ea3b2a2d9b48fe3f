"""Trains groups of heads until they are equal, starting from the donor's heads (DHA, arXiv 2406.06567, section 3.B).

Each head h of a group is Σ_j ω_hj W_j over the group's heads j, ω from δ_hj; ω has a number for each element of a head,
the same one for both of a RoPE pair. What the ω of a group differ by,

    L(ω) = Σ_h,h' mean_j (ω_hj − ω_h'j)², over its value at δ,

may be at most t, which falls from 1 to 0 during the run. The paper comes near to that by a multiplier on L; here ω is
brought back to L ≤ t after each step, by shrinking what it differs from its group's mean by. So a group's heads are one
before the run ends, and to leave one of them in the checkpoint changes nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from mhconvert.errors import HealError

from ..convert.families.facts import rotary_share
from .student import Student

TIGHTENS = 0.7  # share of the steps after which t is 0; its root, a distance, falls evenly
KINDS = ("k", "v")


class Mixing(nn.Module):
    """W (n · d, D) -> the heads Σ_j ω_hj W_j. groups: lists of heads that are to be one; omega (n, m, e), m the largest
    group, e = elements of a head that have a number of their own. A smaller group's other entries stay 0."""

    def __init__(self, groups: Sequence[Sequence[int]], head_dim: int, tied: int):
        """tied: elements of a head that RoPE turns in pairs (i, i + tied / 2); 0 for values."""
        super().__init__()
        heads, most = sum(map(len, groups)), max(map(len, groups))
        self.groups = [list(group) for group in groups]
        self.members = [0] * (heads * most)
        omega = torch.zeros(heads, most, head_dim - tied // 2)
        for group in self.groups:
            for place, head in enumerate(group):
                omega[head, place] = 1.0
                for slot in range(most):
                    self.members[head * most + slot] = group[min(slot, len(group) - 1)]
        self.omega = nn.Parameter(omega)
        pairs = list(range(tied // 2))
        self.element = pairs + pairs + list(range(tied // 2, head_dim - tied // 2))

    def forward(self, weight: Tensor) -> Tensor:
        heads, most, _ = self.omega.shape
        own = weight.unflatten(0, (heads, -1))  # n d …
        chosen = own[self.members].unflatten(0, (heads, most))  # n m d …
        omega = self.omega[..., self.element].to(weight.dtype)
        return torch.einsum("hmd,hmd...->hd...", omega, chosen).flatten(0, 1)

    def apart(self) -> Tensor:
        """Return the sum over the pairs of each group of the mean squared difference of their ω."""
        total = self.omega.new_zeros(())
        for group in self.groups:
            for one, other in itertools.combinations(group, 2):
                difference = self.omega[one, : len(group)] - self.omega[other, : len(group)]
                total = total + difference.square().mean(-1).sum() / len(group)
        return total

    @property
    def unit(self) -> float:
        """The value of `apart` at δ, the initial mixing."""
        return sum(len(group) - 1 for group in self.groups)

    @torch.no_grad()
    def shrink(self, share: float) -> None:
        """Scale each ω's distance from its group's mean by `share`; 0 makes the group equal."""
        for group in self.groups:
            mean = self.omega[group].mean(0)
            self.omega[group] = mean + share * (self.omega[group] - mean)


class FusingStudent(Student):
    """A student whose heads' ω are pulled together after every step."""

    @property
    def mixings(self) -> list[Mixing]:
        """The mixings of layers that have heads to fuse."""
        found = (module for module in self.model.modules() if isinstance(module, Mixing))
        return [mixing for mixing in found if mixing.unit]

    @torch.no_grad()
    def apart(self) -> float:
        """Return L: 1 at the start, 0 when all heads of every group are equal."""
        return sum(float(m.apart()) for m in self.mixings) / sum(m.unit for m in self.mixings)

    def end_step(self, done: float) -> dict[str, Any]:
        """Reduce L to its bound for this step."""
        apart, bound = self.apart(), max(0.0, 1 - done / TIGHTENS) ** 2
        if apart > bound:
            for mixing in self.mixings:
                mixing.shrink((bound / apart) ** 0.5)
        return {"fusion": min(apart, bound)}


def check(config: Any, fusion: int | None) -> None:
    """Raise HealError where there is nothing to fuse, or where heads wait to be fused and --fusion is missing."""
    pending = getattr(config, "k_fusion", None) is not None
    if fusion is not None and not pending:
        raise HealError(
            "the checkpoint has no heads that are to be fused; convert with --to dha --fusion trained for that"
        )
    if fusion is None and pending:
        raise HealError(
            "the checkpoint's heads are still to be fused: say how many become one, with --fusion 2"
        )


def prepare(model: Any, most: int) -> None:
    """Put a `Mixing` on the K and V projections of every layer, in groups of at most `most` heads."""
    for index, layer in enumerate(model.get_decoder().layers):
        attention = layer.self_attn
        turned = int(attention.head_dim * rotary_share(model.config))
        for kind, tied in zip(KINDS, (turned, 0), strict=True):
            groups = chunks(getattr(model.config, f"{kind}_fusion")[index], most)
            projection = getattr(attention, f"{kind}_proj")
            mixing = Mixing(groups, attention.head_dim, tied).to(projection.weight.device)
            for name in _tensors(projection):
                parametrize.register_parametrization(projection, name, mixing)


def _tensors(projection: Any) -> list[str]:
    return ["weight"] if projection.bias is None else ["weight", "bias"]


def chunks(fusion: Sequence[int], most: int) -> list[list[int]]:
    """Return the heads that are fused in one run: of those with one target, at most `most` together."""
    members: dict[int, list[int]] = {}
    for head, target in enumerate(fusion):
        members.setdefault(target, []).append(head)
    return [heads[i : i + most] for heads in members.values() for i in range(0, len(heads), most)]


@torch.no_grad()
def fuse(model: Any, most: int) -> None:
    """Keep one head of each group, which training has made equal, and update the maps of `model.config`."""
    config = model.config
    for index, layer in enumerate(model.get_decoder().layers):
        kept = {}
        for kind in KINDS:
            fusion, head_map = (getattr(config, f"{kind}_{name}")[index] for name in ("fusion", "head_map"))
            groups = chunks(fusion, most)
            where = {head: place for place, group in enumerate(groups) for head in group}
            head_map[:] = [where[head] for head in head_map]
            fusion[:] = [fusion[group[0]] for group in groups]
            kept[kind] = [group[0] for group in groups]
        layer.self_attn = _with_heads(layer.self_attn, kept)
    pending = [heads for kind in KINDS for heads in getattr(config, f"{kind}_fusion")]
    if all(len(set(heads)) == len(heads) for heads in pending):
        config.k_fusion = config.v_fusion = None


def _with_heads(attention: Any, kept: dict[str, list[int]]) -> Any:
    """The attention with the `kept` heads of its K and V projections; its config has the maps of that already."""
    state = {}
    for name, tensor in _plain_state(attention).items():
        kind = name[0]
        heads = (
            tensor.unflatten(0, (-1, attention.head_dim))[kept[kind]].flatten(0, 1)
            if kind in kept
            else tensor
        )
        state[name] = heads.clone()
    with torch.device("meta"):
        fewer = type(attention)(attention.config, attention.layer_idx)
    fewer.load_state_dict(state, strict=True, assign=True)
    return fewer.train(attention.training)


def _plain_state(attention: Any) -> dict[str, Tensor]:
    """Return the weights and biases that the layer computes with."""
    return {
        f"{projection}.{name}": getattr(getattr(attention, projection), name)
        for projection in ("q_proj", "k_proj", "v_proj", "o_proj")
        for name in _tensors(getattr(attention, projection))
    }


def config_fields(config: Any) -> dict[str, Any]:
    """Return the fields of config.json that fusing changes; {} for models without decoupled heads."""
    if getattr(config, "k_head_map", None) is None:
        return {}
    return {
        f"{kind}_{name}": getattr(config, f"{kind}_{name}")
        for kind in KINDS
        for name in ("head_map", "fusion")
    }


def cache_elements(model: Any) -> int:
    """Return the cache elements per token, all layers together."""
    return sum(
        projection.weight.shape[0]
        for layer in model.get_decoder().layers
        for projection in (layer.self_attn.k_proj, layer.self_attn.v_proj)
    )
