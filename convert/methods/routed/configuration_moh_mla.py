"""What a model with latent attention and routed query heads is: the configurations of both in one.

This file is shipped inside converted checkpoints: it imports its siblings only.
"""

from typing import Any

from .configuration_mla import __getattr__ as mla_class
from .configuration_moh import routed_config


def __getattr__(name: str) -> Any:
    """`MoHMLA<Donor>Config`: `MLA<Donor>Config` with the fields of routed heads, made when it is asked for."""
    if not name.startswith("MoHMLA"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return globals().setdefault(name, routed_config(name, mla_class(name.removeprefix("MoH")), __name__))
