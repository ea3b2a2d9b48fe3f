"""The memory that a benchmark takes, counted from shapes."""

from __future__ import annotations

from typing import Any

from ...convert.methods.cache_elements import cache_elements, head_dim
from .random_models import parameters
from .speed import Load


def memory_needed(donor: Any, converted: Any, load: Load, width: int, reexpand: bool) -> tuple[int, int]:
    """(fixed, per_row): an estimate of the bytes needed to time two models, without and per row of the batch.

    It counts the weights, the activations of one row's prefill, all caches, and the copy of a layer's cache that is
    made when it grows.

    Args:
        donor, converted: configs.
        width: bytes per element.
        reexpand: whether the converted model is also timed without absorption.
    """
    text = converted.get_text_config()
    caches = [cache_elements(config) for config in (donor, converted)]
    expanded = (
        6 * text.num_attention_heads * head_dim(text)
    )  # keys and values, and the parts they are made of
    prefill = max(map(sum, caches)) + 8 * text.hidden_size + 3 * text.intermediate_size + expanded
    decoding = sum(map(sum, caches)) + reexpand * (sum(caches[1]) + expanded)
    step = max(step_bytes(config, load, width) for config in (donor, converted))
    weights = parameters(donor) + parameters(converted)
    return width * (weights + load.context * prefill), width * load.context * decoding + step


def step_bytes(config: Any, load: Load, width: int) -> int:
    """Bytes that a decode step of one row has for a while: the copy of the layer's cache that grows, the rotary keys
    that are rotated where they are read, and twice its scores, these in float32.

    Args:
        width: bytes per element of the cache.
    """
    text = config.get_text_config()
    scores = 8 * text.num_attention_heads * load.step_tokens
    layers = [width * elements for elements in cache_elements(config)]
    if getattr(text, "rope_in_latent", False):
        # Of a component its product; in 16 bits besides a float32 copy and the result.
        turned = 8 if width >= 4 else 20
        layers = [size + turned * len(text.layer_frequencies(i)) for i, size in enumerate(layers)]
    return round(load.context * (max(layers) + scores))
