"""Layers of coded latents of which some see a window of recent tokens: windows, rank and bits under one byte budget.

Open `window_bits.py` first: the choice. The model is that of coded latents, in `../mla/`.
"""


def register() -> None:
    """Make transformers' Auto classes know the models in this process; may be called again."""
    from ..mla import register as register_latents

    register_latents()
