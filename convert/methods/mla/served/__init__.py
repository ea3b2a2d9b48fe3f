"""Latent attention in the form that vLLM's Transformers backend takes for latent attention."""


def register() -> None:
    """Make transformers' Auto classes know the served latent-attention models in this process; may be called again."""
    from typing import Any

    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM

    from ....families.facts import FAMILIES
    from . import modeling_served

    for model_type in FAMILIES:
        donor: Any = MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[model_type]]
        model = getattr(modeling_served, f"MLAServed{donor.__name__}")
        AutoConfig.register(model.config_class.model_type, model.config_class, exist_ok=True)
        AutoModelForCausalLM.register(model.config_class, model, exist_ok=True)
