"""Decoupled heads as grouped-query attention: which layers it holds exactly, and in which order of heads.

In a stock layer with G KV heads, each of G groups of H / G consecutive query heads reads one K head and one V head. A
DHA layer has this form if the query heads that read the same pair of heads form equal groups. Query heads may be
permuted (rows of q_proj together with columns of o_proj), and so may K and V heads. Where groups are unequal, or a head
is in more than one pair, copies of heads can make them equal, at the price of a larger cache.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mhconvert.errors import ExportError

HeadMaps = tuple[Sequence[int], Sequence[int]]  # the K head and the V head that each query head reads


@dataclass(frozen=True)
class GroupPlan:
    """One layer as grouped-query attention.

    Attributes:
        order: the query heads of the DHA layer, in their new order.
        k_heads, v_heads: the K head and the V head of the DHA layer that each group reads.
    """

    order: tuple[int, ...]
    k_heads: tuple[int, ...]
    v_heads: tuple[int, ...]

    @property
    def groups(self) -> int:
        """KV heads of the stock layer."""
        return len(self.k_heads)

    @property
    def group_size(self) -> int:
        """Query heads that read one of them."""
        return len(self.order) // self.groups

    @property
    def duplicated(self) -> int:
        """Heads, K and V together, that the stock layer caches beyond those of the DHA layer."""
        return 2 * self.groups - len(set(self.k_heads)) - len(set(self.v_heads))


def readers(maps: HeadMaps) -> dict[tuple[int, int], list[int]]:
    """The query heads that read each pair (K head, V head); pairs in the order of their first reader."""
    heads_of_pair: dict[tuple[int, int], list[int]] = {}
    for head, pair in enumerate(zip(*maps, strict=True)):
        heads_of_pair.setdefault(pair, []).append(head)
    return heads_of_pair


def largest_group(maps: HeadMaps) -> int:
    """The largest size of equal groups of query heads in which every group reads one K head and one V head."""
    return math.gcd(*(len(heads) for heads in readers(maps).values()))


def group(maps: HeadMaps, size: int) -> GroupPlan:
    """The layer in groups of `size` query heads, which divides `largest_group`."""
    order: list[int] = []
    pairs: list[tuple[int, int]] = []
    for pair, heads in readers(maps).items():
        order += heads
        pairs += [pair] * (len(heads) // size)
    return GroupPlan(tuple(order), tuple(k for k, _ in pairs), tuple(v for _, v in pairs))


def plan_layers(
    maps: Sequence[HeadMaps],
    *,
    uniform: bool,
    duplicate: bool,
    head_bytes: int,
    donor_heads: int,
    way_out: str,
) -> list[GroupPlan]:
    """Every layer as grouped queries.

    Args:
        uniform: as many KV heads in all layers; otherwise as few as each can have.
        duplicate: whether heads may be cached more than once where it cannot be done without.
        way_out: what a user can do instead, for the message of a refusal.
        head_bytes: bytes of one head in the cache, per token.
        donor_heads: K and V heads of one layer of the donor.
    Raises:
        ExportError: naming the first layer that needs copies, and what they would cost all together.
    """
    sizes = [largest_group(layer) for layer in maps]
    if uniform:
        sizes = [math.gcd(*sizes)] * len(maps)
    plans = [group(layer, size) for layer, size in zip(maps, sizes, strict=True)]
    index = next((i for i, plan in enumerate(plans) if plan.duplicated), None)
    if index is not None and not duplicate:
        before, after = cached_heads(maps), 2 * sum(plan.groups for plan in plans)
        raise ExportError(
            f"layer {index}: {_why(maps[index], plans[index])}. --duplicate caches {after - before} heads, all layers "
            f"together, more than once: {before * head_bytes} -> {after * head_bytes} KV bytes per token (the donor: "
            f"{donor_heads * len(maps) * head_bytes}); {way_out}"
        )
    return plans


def cached_heads(maps: Sequence[HeadMaps]) -> int:
    """The number of cached heads, K and V together, of all layers."""
    return sum(len(set(k_map)) + len(set(v_map)) for k_map, v_map in maps)


def regrouped(tensors: dict[str, Tensor], plan: GroupPlan, head_dim: int) -> dict[str, Tensor]:
    """The layer's q, k, v and o projections in the order of `plan`; rows are permuted and copied, never computed.

    Args:
        tensors: q_proj.weight (H d, D), k_proj.weight (n_K d, D), v_proj.weight (n_V d, D), o_proj.weight (D, H d),
            and biases of any of them.
    Returns:
        The projections by the same names, k_proj and v_proj with `plan.groups` heads.
    """
    heads = {"q_proj": plan.order, "k_proj": plan.k_heads, "v_proj": plan.v_heads}
    moved = {}
    for name, tensor in tensors.items():
        projection = name.partition(".")[0]
        if projection in heads:
            moved[name] = _take(tensor, heads[projection], head_dim, dim=0)
        elif name == "o_proj.weight":
            moved[name] = _take(tensor, plan.order, head_dim, dim=1)
        else:
            moved[name] = tensor
    return moved


def _take(tensor: Tensor, heads: Sequence[int], head_dim: int, dim: int) -> Tensor:
    chosen = torch.tensor(heads, device=tensor.device)
    return tensor.unflatten(dim, (-1, head_dim)).index_select(dim, chosen).flatten(dim, dim + 1)


def _why(maps: HeadMaps, plan: GroupPlan) -> str:
    """Why a layer's heads do not come out as equal groups, for the message of a refusal."""
    own = group(maps, largest_group(maps))
    if not own.duplicated:
        heads = f"{own.groups} KV head{'s' if own.groups > 1 else ''}"
        return (
            f"it has {heads}, and other layers force groups of {plan.group_size} query heads, which are {plan.groups}; "
            "the class has one number for all layers"
        )
    k_heads, v_heads = len(set(own.k_heads)), len(set(own.v_heads))
    sizes = sorted((len(heads) for heads in readers(maps).values()), reverse=True)
    return (
        f"its {len(plan.order)} query heads read {k_heads} K and {v_heads} V heads in {len(sizes)} pairs, by groups of "
        f"{', '.join(map(str, sizes))}; stock attention has as many K as V heads, each read by a group of one size"
    )
