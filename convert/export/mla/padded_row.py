"""Latents widened with zeros to a row that engines have kernels for. Pure; what is computed stays the same.

The new rows of kv_a_proj_with_mqa are zero, so the cache holds zeros, and kv_b_proj reads them with zero weights. The
norm divides by a mean over more elements, which is smaller: it deviates less from an identity than before.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mhconvert.errors import ExportError

from ...methods.mla.engine_rows import ROWS

READS = ("kv_a_proj_with_mqa.weight", "kv_a_proj_with_mqa.bias")


def padded_rank(rank: int, rope: int, row: int | None) -> int:
    """kv_lora_rank for which the row, rank + rope, is `row`; `rank` for None.

    Raises:
        ExportError: for a row that no engine asks for, or one narrower than what it has to hold.
    """
    if row is None:
        return rank
    if row not in ROWS:
        raise ExportError(f"pad_row={row} is none of the rows that engines take: {', '.join(map(str, ROWS))}")
    if row < rank + rope:
        raise ExportError(
            f"pad_row={row} is less than the row that the checkpoint has, {rank} + {rope} = {rank + rope}; zeros only "
            "widen it: leave it out, or convert again with a smaller --kv-budget"
        )
    return row - rope


def padded(tensors: dict[str, Tensor], rank: int, wider: int) -> dict[str, Tensor]:
    """The tensors of a `LatentAttention` with a latent of `wider` ≥ `rank` elements, the new ones zero.

    Args:
        tensors: by name, kv_a_proj_with_mqa (r + p, D) and kv_b_proj (H (n + v), r) among them.
    """
    made = dict(tensors)
    for name in READS:
        if name in made:
            zeros = made[name].new_zeros(wider - rank, *made[name].shape[1:])
            made[name] = torch.cat((made[name][:rank], zeros, made[name][rank:]))
    up = made["kv_b_proj.weight"]
    made["kv_b_proj.weight"] = torch.cat((up, up.new_zeros(len(up), wider - rank)), dim=1)
    return made


def cost(config: Any, wider: int, element_bytes: int) -> dict[str, Any] | None:
    """What a latent of `wider` elements costs a token, all layers together; None where it is as it was.

    Args:
        config: of the checkpoint.
    Returns:
        row {"from", "to"}: elements of a layer; kv_bytes_per_token {"from", "to", "donor"}.
    """
    rank, rope = config.latent_rank(0), 2 * len(config.layer_frequencies(0))
    if wider == rank:
        return None
    elements = {
        "from": rank + rope,
        "to": wider + rope,
        "donor": 2 * (config.num_key_value_heads or config.num_attention_heads) * config.v_head_dim,
    }
    of_all = {name: count * config.num_hidden_layers * element_bytes for name, count in elements.items()}
    return {"row": {name: elements[name] for name in ("from", "to")}, "kv_bytes_per_token": of_all}
