"""Hydra adapters as a method of peft: two linear low-rank branches on a frozen linear layer (arXiv 2309.06922).

    y0 = W x + b                                     the base layer
    y  = y0 + scale · B_p A_p x + scale · B_s A_s y0   one branch reads its input, the other its output

The first use of one of the classes here makes peft know the method in this process; importing the package alone
imports neither torch nor peft. Open `branches.py` first, then `layer.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import HydraConfig as HydraConfig
    from .layer import HydraLayer as HydraLayer
    from .layer import HydraLinear as HydraLinear
    from .model import HydraModel as HydraModel

__all__ = ["HydraConfig", "HydraLayer", "HydraLinear", "HydraModel", "register"]


def register() -> None:
    """Make peft know Hydra in this process; may be called again. Raises AdapterError where peft has its own Hydra."""
    from . import registration
    from .config import HydraConfig
    from .model import HydraModel

    registration.register(HydraConfig, HydraModel)


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    from . import config, layer, model

    register()
    return next(getattr(module, name) for module in (config, layer, model) if hasattr(module, name))
