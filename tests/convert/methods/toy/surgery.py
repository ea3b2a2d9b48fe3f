"""One projection in, one projection out. Pure: no configuration, no files."""

from __future__ import annotations

from torch import Tensor


def mean_pooled(projection: Tensor, kv_heads: int, head_dim: int) -> Tensor:
    """The projection with runs of neighbouring heads averaged.

    Args:
        projection: (G d, D) weight of k_proj or v_proj, or its bias (G d,).
        kv_heads: G', the heads that are left; it divides G.
        head_dim: d.
    Returns:
        (G' d, D) or (G' d,), in the projection's dtype.
    Source:
        GQA, arXiv 2305.13245, section 2.1.
    """
    return projection.unflatten(0, (kv_heads, -1, head_dim)).mean(1).flatten(0, 1)
