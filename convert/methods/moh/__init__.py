"""Mixture of heads: every token has the outputs of some heads only."""


def register() -> None:
    """Make transformers' Auto classes know the mixture-of-head models in this process; may be called again."""
    from ..auto_classes import register_classes
    from .converted_class import converted_class

    register_classes(converted_class)
