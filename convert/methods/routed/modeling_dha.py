"""Lends the model of decoupled heads to its neighbours."""

from ..dha.modeling_dha import DecoupledHeadAttention as DecoupledHeadAttention
from ..dha.modeling_dha import __getattr__ as __getattr__
from ..dha.modeling_dha import apart as apart
from ..dha.modeling_dha import beside as beside
