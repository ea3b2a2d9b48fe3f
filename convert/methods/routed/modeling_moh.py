"""Lends the model of mixtures of heads to its neighbours."""

from ..moh.modeling_moh import MixtureOfHeadAttention as MixtureOfHeadAttention
from ..moh.modeling_moh import MixtureOfHeadForCausalLM as MixtureOfHeadForCausalLM
from ..moh.modeling_moh import MixtureOfHeadModel as MixtureOfHeadModel
from ..moh.modeling_moh import gated as gated
