"""The transformers class and the configuration of a donor converted to latent attention."""

from __future__ import annotations

from typing import Any

from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

from ...families.facts import attention_facts, class_free_values
from . import modeling_mla


def converted_class(donor_config_class: Any) -> Any:
    """The causal language model class that holds the conversion of a donor with this configuration class."""
    donor: Any = MODEL_FOR_CAUSAL_LM_MAPPING[donor_config_class]
    return getattr(modeling_mla, f"MLA{donor.__name__}")


def latent_config(donor_config: Any, output_bias: bool, rope_in_latent: bool = False) -> Any:
    """The donor's configuration as that of its converted class; the sizes of each layer are still empty.

    Args:
        output_bias: whether o_proj has a bias.
        rope_in_latent: whether kv_b_proj reads the rotary key beside the latent.
    """
    config_class, facts = converted_class(type(donor_config)).config_class, attention_facts(donor_config)
    layers = donor_config.num_hidden_layers
    config = config_class(
        **class_free_values(donor_config),
        kv_lora_rank=[0] * layers,
        rope_frequencies=[[] for _ in range(layers)],
        qk_nope_head_dim=[facts.head_dim] * layers,
        v_head_dim=facts.head_dim,
        rope_in_latent=rope_in_latent,
        attention_output_bias=output_bias,
        attention_input_bias=facts.input_bias,
        softmax_scale=facts.scale,
        attention_softcap=facts.softcap,
        qk_norm=facts.qk_norm,
    )
    config._attn_implementation = "sdpa" if facts.softcap is None else "eager"
    return config
