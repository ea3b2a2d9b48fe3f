"""Some layers become linear mixers with a state of fixed size, the others coded latents (Zebra-Llama, 2505.17272).

Open `surgery.py` first: how an attention becomes the start of a mixer. `linear_choice.py` says which layers do. The
model is `modeling_hybrid.py` beside that of coded latents, in `../mla/`: shipped files lie in one folder.
"""


def register() -> None:
    """Make transformers' Auto classes know the models where transformers has their mixers; may be called again."""
    from ..auto_classes import register_classes
    from ..mla import register as register_latents
    from .method import hybrid_class, unsupported

    register_latents()
    if unsupported() is None:
        register_classes(hybrid_class)
