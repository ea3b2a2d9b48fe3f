"""Layers that see only a window of recent tokens, in stock transformers classes.

Open `targets.py` first: which class holds which donor. `surgery.py` has the mathematics of the sinks.
"""


def register() -> None:
    """Nothing to make known: every result is one of transformers' own classes."""
