"""Fusion of heads by training: the heads of a group become equal during the run, starting from the donor's heads.

Head h of a group is Σ_j ω_hj W_j over the heads j of the group, with ω_hj = δ_hj at the start. ω has one coefficient
for each element of a head, shared by the two elements of a RoPE pair. The fusion loss

    L(ω) = Σ_h,h' mean_j (ω_hj − ω_h'j)², divided by its value at δ,

is bounded by a t that falls from 1 to 0 during the run. Departure from the paper, which enforces the bound
approximately by a Lagrange multiplier: here ω is projected back to L ≤ t after each step, by scaling its distance from
the group's mean. So the heads of a group are exactly equal before the run ends, and keeping one of them is exact.

Source: DHA, arXiv 2406.06567, section 3.B.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from mhconvert.errors import HealError

from ..convert.families.facts import cached_part, rotary_share
from ..convert.methods.registry import whole_elements
from .student import Student

FUSED_AFTER = 0.7  # fraction of the steps after which t is 0; √t falls linearly
KINDS = ("k", "v")


class Mixing(nn.Module):
    """A parametrisation of a projection: W (n · d, D) -> the mixed heads Σ_j ω_hj W_j.

    Attributes:
        groups: lists of heads that are to be fused.
        omega: (n, m, e): m the size of the largest group, e the coefficients of a head. In smaller groups the unused
            entries stay 0.
    """

    def __init__(self, groups: Sequence[Sequence[int]], head_dim: int, tied: int):
        """
        Args:
            tied: elements of a head that RoPE rotates in pairs (i, i + tied / 2), which share a coefficient; 0 for
                values.
        """
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
        by_head = weight.unflatten(0, (heads, -1))  # n d …
        members = by_head[self.members].unflatten(0, (heads, most))  # n m d …
        omega = self.omega[..., self.element].to(weight.dtype)
        return torch.einsum("hmd,hmd...->hd...", omega, members).flatten(0, 1)

    def distance(self) -> Tensor:
        """The mean squared difference of ω, summed over the pairs of heads of each group; ()."""
        total = self.omega.new_zeros(())
        for group in self.groups:
            for one, other in itertools.combinations(group, 2):
                difference = self.omega[one, : len(group)] - self.omega[other, : len(group)]
                total = total + difference.square().mean(-1).sum() / len(group)
        return total

    @property
    def initial_distance(self) -> float:
        """The value of `distance` at ω = δ."""
        return sum(len(group) - 1 for group in self.groups)

    @torch.no_grad()
    def shrink(self, share: float) -> None:
        """Scale the difference of ω from its group's mean by `share`; 0 makes the heads of a group equal."""
        for group in self.groups:
            mean = self.omega[group].mean(0)
            self.omega[group] = mean + share * (self.omega[group] - mean)


class FusingStudent(Student):
    """A student whose groups of heads are drawn together after every step."""

    @property
    def mixings(self) -> list[Mixing]:
        """The mixings that have heads to fuse."""
        mixings = (module for module in self.model.modules() if isinstance(module, Mixing))
        return [mixing for mixing in mixings if mixing.initial_distance]

    @torch.no_grad()
    def fusion_loss(self) -> float:
        """L(ω): 1 at the start, 0 when the heads of every group are equal."""
        return sum(float(m.distance()) for m in self.mixings) / sum(m.initial_distance for m in self.mixings)

    def end_step(self, done: float) -> dict[str, Any]:
        """Project ω to L(ω) ≤ t; returns the value of L as "fusion"."""
        loss, bound = self.fusion_loss(), max(0.0, 1 - done / FUSED_AFTER) ** 2
        if loss > bound:
            for mixing in self.mixings:
                mixing.shrink((bound / loss) ** 0.5)
        return {"fusion": min(loss, bound)}


def check(config: Any, fusion: int | None) -> None:
    """Raises HealError if `fusion` is set for a checkpoint without heads to fuse, or is missing for one with them."""
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
    """Parametrise the K and V projections of every layer by a `Mixing` of groups of at most `most` heads."""
    for index, layer in enumerate(model.get_decoder().layers):
        attention = layer.self_attn
        rotary_dim = int(attention.head_dim * rotary_share(model.config))
        for kind, tied in zip(KINDS, (rotary_dim, 0), strict=True):
            groups = chunks(getattr(model.config, f"{kind}_fusion")[index], most)
            projection = getattr(attention, f"{kind}_proj")
            mixing = Mixing(groups, attention.head_dim, tied).to(projection.weight.device)
            for name in _tensors(projection):
                parametrize.register_parametrization(projection, name, mixing)


def _tensors(projection: Any) -> list[str]:
    return ["weight"] if projection.bias is None else ["weight", "bias"]


def chunks(fusion: Sequence[int], most: int) -> list[list[int]]:
    """The groups of heads that one run fuses: heads with the same target, at most `most` in a group.

    Args:
        fusion: head -> its target.
    """
    members: dict[int, list[int]] = {}
    for head, target in enumerate(fusion):
        members.setdefault(target, []).append(head)
    return [heads[i : i + most] for heads in members.values() for i in range(0, len(heads), most)]


@torch.no_grad()
def fuse(model: Any, most: int) -> None:
    """Keep one of the equal heads of each group, in place, and update the head maps of `model.config`."""
    config = model.config
    for index, layer in enumerate(model.get_decoder().layers):
        kept = {}
        for kind in KINDS:
            fusion, head_map = (getattr(config, f"{kind}_{name}")[index] for name in ("fusion", "head_map"))
            groups = chunks(fusion, most)
            new_index = {head: index for index, group in enumerate(groups) for head in group}
            head_map[:] = [new_index[head] for head in head_map]
            fusion[:] = [fusion[group[0]] for group in groups]
            kept[kind] = [group[0] for group in groups]
        layer.self_attn = _with_heads(layer.self_attn, kept)
    pending = [heads for kind in KINDS for heads in getattr(config, f"{kind}_fusion")]
    if all(len(set(heads)) == len(heads) for heads in pending):
        config.k_fusion = config.v_fusion = None


def _with_heads(attention: Any, kept: dict[str, list[int]]) -> Any:
    """A copy of the attention with only the `kept` heads; its config has the new head maps already."""
    state = {}
    for name, tensor in _plain_state(attention).items():
        kind = name[0]
        heads = (
            tensor.unflatten(0, (-1, attention.head_dim))[kept[kind]].flatten(0, 1)
            if kind in kept
            else tensor
        )
        state[name] = heads.clone()
    norms = (attention.q_norm, attention.k_norm) if attention.qk_norm else None
    for name, norm in zip(("q_norm", "k_norm"), norms or (), strict=False):
        state |= {f"{name}.{part}": tensor for part, tensor in norm.state_dict().items()}
    with torch.device("meta"):
        smaller = type(attention)(attention.config, attention.layer_idx, norms)
    smaller.load_state_dict(state, strict=True, assign=True)
    return smaller.train(attention.training)


def _plain_state(attention: Any) -> dict[str, Tensor]:
    """The weights and biases of the projections after parametrisation."""
    return {
        f"{projection}.{name}": getattr(getattr(attention, projection), name)
        for projection in ("q_proj", "k_proj", "v_proj", "o_proj")
        for name in _tensors(getattr(attention, projection))
    }


def config_fields(config: Any) -> dict[str, Any]:
    """The fields of config.json that fusion changes; {} for models without decoupled heads."""
    if getattr(config, "k_head_map", None) is None:
        return {}
    return {
        f"{kind}_{name}": getattr(config, f"{kind}_{name}")
        for kind in KINDS
        for name in ("head_map", "fusion")
    }


def cache_elements(model: Any, context: int | None = None) -> int:
    """The KV-cache elements per token over all layers, where the cache holds `context` tokens; None: any number."""
    elements = sum(
        projection.weight.shape[0] * cached_part(model.config, index, context)
        for index, layer in enumerate(model.get_decoder().layers)
        for projection in (layer.self_attn.k_proj, layer.self_attn.v_proj)
    )
    return int(whole_elements(elements, context))
