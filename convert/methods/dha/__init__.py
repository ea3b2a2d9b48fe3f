"""Decoupled heads: K heads and V heads of multi-head or grouped-query attention fused apart."""


def register() -> None:
    """Make transformers' Auto classes know the decoupled-head models in this process; may be called again."""
    from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

    from ...families.facts import FAMILIES
    from .converted_class import decoupled_class

    for model_type in FAMILIES:
        model = decoupled_class(CONFIG_MAPPING[model_type])
        AutoConfig.register(model.config_class.model_type, model.config_class, exist_ok=True)
        AutoModelForCausalLM.register(model.config_class, model, exist_ok=True)
