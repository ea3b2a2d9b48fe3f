"""Lends the model of latent attention to its neighbours."""

from ..mla.modeling_mla import LatentAttention as LatentAttention
from ..mla.modeling_mla import __getattr__ as __getattr__
from ..mla.modeling_mla import by_heads as by_heads
