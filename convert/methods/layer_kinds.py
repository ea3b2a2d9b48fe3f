"""What plans and reports say of a layer where layers are of several kinds. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

FULL, WINDOWED, LINEAR = "full", "windowed", "linear"
KINDS = (FULL, WINDOWED, LINEAR)
CODES = "codes"  # what the codes of a layer that has some are expected to cost, beside its kind


def layer_kind(kind: str, kv_share: float, costs: Mapping[str, float]) -> dict[str, Any]:
    """The kind of a layer, and its prices where they were measured.

    Args:
        kv_share: of the cache of the donor's layer, at the length for which the budget is counted.
        costs: by kind, what this layer alone costs as one of it, and by CODES what its codes do, nats a token.
    """
    return {"kind": kind, "kv_share": kv_share, **({"costs": dict(costs)} if costs else {})}
