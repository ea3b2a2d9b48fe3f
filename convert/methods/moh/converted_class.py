"""The class and the configuration of a donor's conversion."""

from __future__ import annotations

from typing import Any

from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

from ...families.facts import attention_facts, class_free_values
from . import modeling_moh


def converted_class(donor_config_class: Any) -> Any:
    """The transformers class that holds a converted donor of a configuration class."""
    donor: Any = MODEL_FOR_CAUSAL_LM_MAPPING[donor_config_class]
    return getattr(modeling_moh, f"MoH{donor.__name__}")


def mixture_config(donor_config: Any, route: str = "heads", router: str = "learned") -> Any:
    """The donor's configuration as that of its mixture-of-head class; every head is shared still."""
    config_class, facts = converted_class(type(donor_config)).config_class, attention_facts(donor_config)
    units, layers = facts.heads if route == "heads" else facts.kv_heads, donor_config.num_hidden_layers
    config = config_class(
        **class_free_values(donor_config),
        head_route=route,
        head_router=router,
        shared_heads=[list(range(units)) for _ in range(layers)],
        active_heads=[units] * layers,
        softmax_scale=facts.scale,
        attention_softcap=facts.softcap,
    )
    config._attn_implementation = "sdpa" if facts.softcap is None else "eager"
    return config
