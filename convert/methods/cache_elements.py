"""What a token leaves in the cache of a model, by its configuration: of a donor's class, or of a method's."""

from __future__ import annotations

from typing import Any

import torch

from .mla.latent_code import row_bytes


def cache_elements(config: Any) -> list[float]:
    """(layers,), the elements that one token adds to each layer's cache; bytes of codes count as parts of them."""
    text = config.get_text_config()
    layers = range(text.num_hidden_layers)
    if getattr(text, "rope_frequencies", None) is not None:
        scales = text.num_key_scales
        return [text.latent_rank(i) + 2 * len(text.layer_frequencies(i)) + scales for i in layers]
    if getattr(text, "kv_code_counts", None) is not None:
        width = (text.dtype or torch.float32).itemsize
        linear = getattr(text, "linear_layers", None) or ()
        return [0.0 if i in linear else row_bytes(text.layer_counts(i)) / width for i in layers]
    if hasattr(text, "k_head_map"):
        return [head_dim(text) * sum(max(heads) + 1 for heads in text.head_maps(i)) for i in layers]
    if getattr(text, "kv_lora_rank", None) is not None:
        return [text.kv_lora_rank + text.qk_rope_head_dim for _ in layers]
    return [2 * kv_heads(text) * head_dim(text) for _ in layers]


def kv_heads(config: Any) -> int:
    """KV heads of the config, or its query heads where it names none."""
    return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)


def head_dim(config: Any) -> int:
    """`head_dim` of the config, or hidden_size / num_attention_heads where it has none."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
