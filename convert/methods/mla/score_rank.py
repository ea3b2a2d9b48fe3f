"""How wide a head's query and key without RoPE have to be. Pure, float64.

Only their product counts, qᵀ B c for a donor's query q and for c, what kv_b_proj reads; on text it has a lower rank
than head_dim. Its best form of rank n is a truncated SVD of Mq^½ B Mc^½, Mq and Mc the moments of q and c.

Shapes: H query heads, d head_dim, m elements that kv_b_proj reads, n width of the result.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...attention.linalg import balance, roots

# Share of the energy of the scores without RoPE that narrower keys may lose. On a textbook that the conversion of
# SmolLM2 did not read, this much adds 0.003 to a KL of 0.78 at 31.25 %, and ten times as much 0.006.
SCORE_LOSS = 1e-4
EVEN = 8  # elements: kernels read a head's row in vectors of as many


def score_factors(
    query_map: Tensor, key_up: Tensor, query_moments: Tensor, read_moment: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The scores of each head as a sum of d products, the largest first: the first n are the best form of rank n.

    Args:
        query_map: (H, d, d), from a donor's query to what meets the key.
        key_up: (H, d, m), the key.
        query_moments: (H, d, d) = E[q qᵀ] of the donor's queries.
        read_moment: (m, m) of c: about its mean where a constant on all keys of a query cancels, else about zero.

    Returns:
        query_map (H, d, d) and key_up (H, d, m) of the same scores, and (H, d), the energy of each product.
    """
    product = query_map.mT @ key_up
    root, inverse_root = (torch.stack(each) for each in zip(*map(roots, query_moments), strict=True))
    seen = root @ product
    energy, vectors = torch.linalg.eigh(seen @ read_moment @ seen.mT)
    leading = vectors.flip(-1).mT  # eigh sorts in ascending order
    return leading @ inverse_root, leading @ seen, energy.flip(-1).clamp_min(0)


def least_width(energy: Tensor, loss: float, rotary: int) -> int:
    """The smallest n whose products leave out no more than `loss` of the energy of all heads' products together.

    It is then widened as far as that is free: with the `rotary` elements to head_dim, which the values have anyway,
    and to a multiple of EVEN; at most to head_dim.

    Args:
        energy: (H, d), of each product, the largest first.
        rotary: 2R, the elements of a head's query that RoPE turns.
    """
    head_dim = energy.shape[1]
    left_out = energy.sum(0).flip(0).cumsum(0).flip(0)  # by the first n products, for n = 0 … d - 1
    least = int((left_out > loss * energy.sum()).sum())
    whole = max(least + rotary, head_dim)
    return min(head_dim, whole + -whole % EVEN - rotary)


def narrowed(
    query_map: Tensor,
    key_up: Tensor,
    query_weights: Tensor,
    moments: tuple[Tensor, Tensor],
    loss: float,
    rotary: int,
) -> tuple[Tensor, Tensor]:
    """`query_map` (H, n, d) and `key_up` (H, n, m) of the least width n; as they are where that is head_dim.

    Both have one magnitude, as weights of one magnitude learn at one rate.

    Args:
        query_map, key_up: as for `score_factors`.
        query_weights: (H, d, D), the donor's q_proj.
        moments: of the hidden states that queries are made of, (D, D), and of what kv_b_proj reads, (m, m).
        loss, rotary: as for `least_width`.
    """
    of_queries = query_weights @ moments[0] @ query_weights.mT
    queries, keys, energy = score_factors(query_map, key_up, of_queries, moments[1])
    width = least_width(energy, loss, rotary)
    if width == query_map.shape[1]:
        return query_map, key_up
    queries, keys = queries[:, :width], keys[:, :width]
    factors = balance((queries @ query_weights).square().mean(2), keys.square().mean(2)).unsqueeze(2)
    return queries * factors, keys / factors
