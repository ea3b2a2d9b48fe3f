"""Lends the model of latent attention to its neighbours."""

from ..mla.modeling_mla import LatentAttention as LatentAttention
from ..mla.modeling_mla import __getattr__ as __getattr__
