"""The transformers class and the configuration of a donor converted to decoupled heads."""

from __future__ import annotations

import copy
from typing import Any

from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

from ...families.facts import attention_facts, class_free_values
from . import modeling_dha


def converted_class(donor_config_class: Any) -> Any:
    """The causal language model class that holds the conversion of a donor with this configuration class."""
    donor: Any = MODEL_FOR_CAUSAL_LM_MAPPING[donor_config_class]
    return getattr(modeling_dha, f"DHA{donor.__name__}")


def decoupled_config(donor_config: Any, output_bias: bool) -> Any:
    """The donor's configuration as that of its converted class; the head maps of each layer are still the donor's.

    Args:
        output_bias: whether o_proj has a bias even where the donor's has none.
    """
    config_class, facts = converted_class(type(donor_config)).config_class, attention_facts(donor_config)
    own = [facts.head_map for _ in range(donor_config.num_hidden_layers)]
    config = config_class(
        **class_free_values(donor_config),
        k_head_map=copy.deepcopy(own),
        v_head_map=own,
        attention_output_bias=output_bias or facts.output_bias,
        attention_input_bias=facts.input_bias,
        softmax_scale=facts.scale,
        attention_softcap=facts.softcap,
        qk_norm=facts.qk_norm,
    )
    config._attn_implementation = "sdpa" if facts.softcap is None else "eager"
    return config
