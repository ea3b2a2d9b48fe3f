"""Latent attention in the form that vLLM's Transformers backend takes for latent attention."""


def register() -> None:
    """Make transformers' Auto classes know the served latent-attention models in this process; may be called again."""
    from ...auto_classes import register_classes
    from .served_class import served_class

    register_classes(served_class)
