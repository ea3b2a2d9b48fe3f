"""Mixture-of-head attention (MoH, arXiv 2410.11842): every token has the outputs of some of the heads only.

Open `surgery.py` first: it holds the closed forms of the routers.
"""


def register() -> None:
    """Make transformers' Auto classes know the mixture-of-head models in this process; may be called again."""
    from functools import partial

    from ..auto_classes import register_classes
    from ..routed.attention_kinds import routed_donors
    from .converted_class import converted_class, routed_class

    register_classes(converted_class)
    for of_config in routed_donors():
        register_classes(of_config)
        register_classes(partial(routed_class, of_config))
