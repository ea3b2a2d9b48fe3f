"""Causal language models with decoupled heads whose tokens each use some of a layer's query heads.

This file is shipped inside converted checkpoints: it imports torch, transformers and its siblings only.

Shapes: B batch, T query tokens, S cached tokens, H query heads, K and V numbers of cached heads, d head_dim.
"""

from typing import Any

from torch import Tensor, nn
from transformers.cache_utils import Cache

from .configuration_moh_dha import __getattr__ as config_class
from .modeling_dha import DecoupledHeadAttention, apart, beside
from .modeling_dha import __getattr__ as donor_class
from .modeling_moh import MixtureOfHeadAttention
from .routed_class import routed_class


class RoutedDecoupledAttention(MixtureOfHeadAttention, DecoupledHeadAttention):
    """Decoupled heads of which a token has some. The cache is that of all.

    In prompts, heads that a token has not are not computed. A step of few tokens reads the cached heads as they are,
    for all query heads, and leaves out what was not chosen.
    """

    def __init__(self, donor: nn.Module, config: Any, layer_idx: int):
        super().__init__(donor, config, layer_idx)
        known: Any = donor
        self.keys, self.values, self.stock = known.keys, known.values, known.stock
        self.cached_heads, self.step = known.cached_heads, known.step
        self.num_key_value_groups = known.num_key_value_groups
        self.kv_heads = (
            self.heads // self.num_key_value_groups
        )  # as they are where each query head has its own copy

    def attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        active: Tensor | None,
        attention_mask: Any,
        past_key_values: Cache | None,
        kwargs: dict[str, Any],
    ) -> tuple[Tensor, Tensor | None]:
        """query [B, H, T, d], key [B, K, T, d], value [B, V, T, d] -> the heads' outputs [B, T, H, d], weights."""
        key, value = beside(key, self.cached_heads), beside(value, self.cached_heads)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
            if not self.stock and self.can_group(query.shape[2], attention_mask):
                output, weights = self.grouped_attention(query, key, value, attention_mask)
                return output.unflatten(-1, (self.heads, -1)), weights
        if not self.stock:
            key = self.keys.expand(apart(key, self.head_dim))
            value = self.values.expand(apart(value, self.head_dim))
        return super().attention(query, key, value, active, attention_mask, None, kwargs)


def __getattr__(name: str) -> Any:
    """`MoHDHA<Donor>Model` and `MoHDHA<Donor>ForCausalLM`, made when they are asked for."""
    if not (name.startswith("MoHDHA") and name.endswith(("Model", "ForCausalLM"))):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    donor = donor_class(name.removeprefix("MoH"))
    return globals().setdefault(name, routed_class(name, donor, RoutedDecoupledAttention, config_class))
