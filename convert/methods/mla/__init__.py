"""Multi-head latent attention from multi-head or grouped-query attention."""


def register() -> None:
    """Make transformers' Auto classes know the latent-attention models in this process; may be called again."""
    from ..auto_classes import register_classes
    from . import served
    from .converted_class import converted_class

    served.register()  # its model_types begin with "mla_" too
    register_classes(converted_class)
