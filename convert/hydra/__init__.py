"""Hydra adapters as a method of peft: two linear low-rank branches on a frozen linear layer (arXiv 2309.06922).

    y0 = W x + b                                     the base layer
    y  = y0 + scale · B_p A_p x + scale · B_s A_s y0   one branch reads its input, the other its output

Importing this package makes peft know the method in this process. Open `../adapter/merging.py` first, then
`layer.py`.
"""

from mhconvert.convert.hydra.config import HydraConfig
from mhconvert.convert.hydra.layer import HydraLayer, HydraLinear
from mhconvert.convert.hydra.model import HydraModel
from mhconvert.convert.hydra.registration import register

__all__ = ["HydraConfig", "HydraLayer", "HydraLinear", "HydraModel", "register"]

register(HydraConfig, HydraModel)
