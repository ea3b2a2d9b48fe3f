"""The transformers class and the configuration of a donor converted to coded latents."""

from __future__ import annotations

from typing import Any

from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

from ...families.facts import attention_facts, class_free_values
from . import modeling_coded_mla


def coded_class(donor_config_class: Any) -> Any:
    """The causal language model class that holds the conversion of a donor with this configuration class."""
    donor: Any = MODEL_FOR_CAUSAL_LM_MAPPING[donor_config_class]
    return getattr(modeling_coded_mla, f"CodedMLA{donor.__name__}")


def coded_config(donor_config: Any, held_by: Any = None) -> Any:
    """The donor's configuration as that of its converted class; the layers have no components yet.

    held_by: another class than `coded_class`, whose configuration has the fields of coded latents.
    """
    facts = attention_facts(donor_config)
    config = (held_by or coded_class(type(donor_config))).config_class(
        **class_free_values(donor_config),
        kv_code_counts=[[0] * 8 for _ in range(donor_config.num_hidden_layers)],
        attention_input_bias=facts.input_bias,
        attention_output_bias=facts.output_bias,
        qk_norm=facts.qk_norm,
        softmax_scale=facts.scale,
        attention_softcap=facts.softcap,
    )
    config._attn_implementation = "sdpa" if facts.softcap is None else "eager"
    return config
