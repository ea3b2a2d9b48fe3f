"""Multi-head latent attention from multi-head or grouped-query attention."""


def register() -> None:
    """Make transformers' Auto classes know the latent-attention models in this process; may be called again."""
    from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

    from ...families.facts import FAMILIES
    from . import served
    from .converted_class import model_class

    served.register()  # the form in which a checkpoint is served begins with the same model_type
    for model_type in FAMILIES:
        model = model_class(CONFIG_MAPPING[model_type])
        AutoConfig.register(model.config_class.model_type, model.config_class, exist_ok=True)
        AutoModelForCausalLM.register(model.config_class, model, exist_ok=True)
