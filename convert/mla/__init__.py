"""Multi-head latent attention from multi-head or grouped-query attention."""


def register() -> None:
    """Make transformers' Auto classes know the latent-attention models in this process; may be called again."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from mhconvert.convert.mla.method import MODELS

    for model in MODELS.values():
        AutoConfig.register(model.config_class.model_type, model.config_class, exist_ok=True)
        AutoModelForCausalLM.register(model.config_class, model, exist_ok=True)
