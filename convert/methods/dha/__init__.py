"""Decoupled-head attention (DHA, arXiv 2406.06567): K heads and V heads are fused in clusters of their own.

Open `surgery.py` first: it holds the mathematics.
"""


def register() -> None:
    """Make transformers' Auto classes know the decoupled-head models in this process; may be called again."""
    from ..auto_classes import register_classes
    from .converted_class import converted_class

    register_classes(converted_class)
