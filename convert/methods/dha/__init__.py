"""Decoupled heads: K heads and V heads of multi-head or grouped-query attention, fused each for themselves."""


def register() -> None:
    """Make transformers' Auto classes know the decoupled-head models in this process; may be called again."""
    from ..auto_classes import register_classes
    from .converted_class import converted_class

    register_classes(converted_class)
