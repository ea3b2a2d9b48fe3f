"""Causal language models some of whose layers see a window of recent tokens and the first tokens of the text.

Each class is its donor's own transformers class with the donor's weights: the attention of windowed layers reads a
cache of other tokens, by another mask. This file is shipped inside converted checkpoints: it imports torch,
transformers and its siblings only.

Shapes: B batch, H query heads, G KV heads, T query tokens, d head_dim.
"""

import copy
from functools import cache
from typing import Any

import transformers
from torch import Tensor
from transformers import MODEL_MAPPING
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from . import configuration_swa
from .configuration_swa import WindowFields
from .first_tokens import (
    WindowRows,
    attend,
    place_windows,
    sequence_starts,
    visible_slots,
    window_layer,
    window_view,
    with_first,
)

IMPLEMENTATION = "mhconvert_first_tokens"


class WindowedAttention:
    """Mixed into a donor's attention, see `in_window`: the layer of the cache is made before the donor fills it."""

    kv_window: int
    layer_idx: int
    model_config: Any

    def forward(
        self,
        hidden_states: Tensor,
        *args: Any,
        attention_mask: Any = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> Any:
        """As the donor's. attention_mask: of the whole text, as the model makes it.

        Raises ValueError for output_attentions.
        """
        if kwargs.get("output_attentions") or getattr(self.model_config, "output_attentions", False):
            raise ValueError(
                f"output_attentions: layer {self.layer_idx} has a window and makes no weights of the whole text; leave "
                "it out, or ask the donor"
            )
        if past_key_values is not None:
            held = window_layer(past_key_values, self.layer_idx, self.kv_window)
            held.starts = sequence_starts(visible_slots(attention_mask), hidden_states)
            kwargs["held"] = held
        seen = {"attention_mask": attention_mask, "past_key_values": past_key_values}
        return super().forward(hidden_states, *args, **seen, **kwargs)  # type: ignore[misc]


def windowed_attention(
    layer: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, held: Any = None, **options: Any
) -> tuple[Tensor, None]:
    """The attention function of transformers for a WindowedAttention: outputs [B, T, H, d], and no weights.

    Args:
        query: [B, H, T, d]; key, value: [B, G, …, d], what `held` returned, or those of the queries' tokens.
        held: the layer of the cache; None: there is none.
    """
    visible = visible_slots(mask)
    starts = sequence_starts(visible, query)
    if isinstance(held, WindowRows):
        slots = seen = held.seen
    else:
        slots = key.shape[2]
        seen = slots if held is None else held.get_seq_length()
        key, value = with_first(key, starts), with_first(value, starts)
    view = window_view(layer.kv_window, query.shape[2], key.shape[2], slots, seen, starts, visible)
    kind = layer.model_config._attn_implementation
    return attend(layer, kind, view, query, key, value, slots == seen, **options), None


ALL_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, windowed_attention)


def in_window(attention: Any, window: int) -> Any:
    """`attention`, a donor's with its weights, which sees `window` tokens and the first ones from now on."""
    attention.kv_window, attention.model_config = window, attention.config
    attention.config = copy.copy(attention.config)
    attention.config._attn_implementation = IMPLEMENTATION
    kind: Any = type(attention)
    attention.__class__ = _windowed_class(kind)
    return attention


@cache
def _windowed_class(donor: type) -> type:
    return type(f"Windowed{donor.__name__}", (WindowedAttention, donor), {"__module__": __name__})


class WindowedLayers:
    """Mixed into the donor's decoder stack and into its causal language model."""

    def __init__(self, config: WindowFields):
        super().__init__(config)  # type: ignore[call-arg]
        layers: Any = self.get_decoder().layers  # type: ignore[attr-defined]
        for layer, window in zip(layers, config.kv_windows or [None] * len(layers), strict=True):
            if window is not None:
                in_window(layer.self_attn, window)

    def _prepare_cache_for_generation(self, generation_config: Any, model_kwargs: Any, *args: Any) -> Any:
        made = super()._prepare_cache_for_generation(generation_config, model_kwargs, *args)  # type: ignore[misc]
        if (held := model_kwargs.get("past_key_values")) is not None:
            place_windows(held, self.config.kv_windows or [], generation_config.is_assistant)  # type: ignore[attr-defined]
        return made


def __getattr__(name: str) -> Any:
    """`SWA<Donor>Model` and `SWA<Donor>ForCausalLM`, made from transformers' classes when they are asked for."""
    donor = getattr(transformers, name.removeprefix("SWA"), None)
    if not (name.startswith("SWA") and name.endswith(("Model", "ForCausalLM")) and donor):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    config_class = getattr(configuration_swa, f"SWA{donor.config_class.__name__}")
    body: dict[str, Any] = {"__module__": __name__, "config_class": config_class}
    if name.endswith("ForCausalLM"):
        stack: Any = MODEL_MAPPING[donor.config_class]
        body["decoder_class"] = __getattr__(f"SWA{stack.__name__}")
    return globals().setdefault(name, type(name, (WindowedLayers, donor), body))
