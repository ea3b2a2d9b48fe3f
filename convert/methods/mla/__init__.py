"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434) from multi-head or grouped-query attention.

Open `surgery.py` first: it holds the mathematics. TransMLA (arXiv 2502.07864) makes such a conversion by other means.
"""


def register() -> None:
    """Make transformers' Auto classes know the latent-attention models in this process; may be called again."""
    from ..auto_classes import register_classes
    from . import served
    from .coded_class import coded_class
    from .converted_class import converted_class

    served.register()  # its model_types begin with "mla_" too
    register_classes(coded_class)
    register_classes(converted_class)
