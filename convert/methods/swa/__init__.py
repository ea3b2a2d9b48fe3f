"""Layers that see only a window of recent tokens, in stock transformers classes, or with the first tokens in ours.

Open `targets.py` first: which class holds which donor. `surgery.py` has the mathematics of the sinks, `modeling_swa.py`
what is shipped where the first tokens stay.
"""


def register() -> None:
    """Make transformers' Auto classes know the models of ours in this process; may be called again."""
    from ..auto_classes import register_classes
    from .converted_class import converted_class

    register_classes(converted_class)
