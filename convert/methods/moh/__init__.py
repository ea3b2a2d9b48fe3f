"""Mixture of heads: every token has the outputs of some heads only."""


def register() -> None:
    """Make transformers' Auto classes know the mixture-of-head models in this process; may be called again."""
    from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

    from ...families.facts import FAMILIES
    from .converted_class import mixture_class

    for model_type in FAMILIES:
        model = mixture_class(CONFIG_MAPPING[model_type])
        AutoConfig.register(model.config_class.model_type, model.config_class, exist_ok=True)
        AutoModelForCausalLM.register(model.config_class, model, exist_ok=True)
