"""The transformers class and the configuration of a donor converted to a mixture of heads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

from ...families.facts import attention_facts, class_free_values
from ..routed.attention_kinds import routed_file
from . import modeling_moh


def converted_class(donor_config_class: Any) -> Any:
    """The causal language model class that holds the conversion of a donor with this configuration class."""
    donor: Any = MODEL_FOR_CAUSAL_LM_MAPPING[donor_config_class]
    return getattr(routed_file(donor, modeling_moh), f"MoH{donor.__name__}")


def routed_class(donor_class: Callable[[Any], Any], config_class: Any) -> Any:
    """The class with routed heads of the converted model that `donor_class` is for a family's configuration class."""
    return converted_class(donor_class(config_class).config_class)


def mixture_config(donor_config: Any, route: str = "heads", router: str = "learned") -> Any:
    """The donor's configuration as that of its converted class; every head is still shared.

    Args:
        route: what is routed, "heads" or "groups".
        router: "learned" or "norm".
    """
    config_class, facts = converted_class(type(donor_config)).config_class, attention_facts(donor_config)
    units, layers = facts.heads if route == "heads" else facts.kv_heads, donor_config.num_hidden_layers
    own = {
        "head_route": route,
        "head_router": router,
        "shared_heads": [list(range(units)) for _ in range(layers)],
        "active_heads": [units] * layers,
        "whole_start": True,
        "softmax_scale": facts.scale,
        "attention_softcap": facts.softcap,
    }
    config = config_class(**class_free_values(donor_config) | own)
    config._attn_implementation = "sdpa" if facts.softcap is None else "eager"
    return config
