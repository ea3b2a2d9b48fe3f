"""What a model with decoupled heads and routed query heads is: the configurations of both in one.

This file is shipped inside converted checkpoints: it imports its siblings only.
"""

from typing import Any

from .configuration_dha import __getattr__ as dha_class
from .configuration_moh import routed_config


def __getattr__(name: str) -> Any:
    """`MoHDHA<Donor>Config`: `DHA<Donor>Config` with the fields of routed heads, made when it is asked for."""
    if not name.startswith("MoHDHA"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return globals().setdefault(name, routed_config(name, dha_class(name.removeprefix("MoH")), __name__))
