"""Lends the configuration of latent attention to its neighbours."""

from ..mla.configuration_mla import __getattr__ as __getattr__
