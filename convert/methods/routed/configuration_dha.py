"""Lends the configuration of decoupled heads to its neighbours."""

from ..dha.configuration_dha import __getattr__ as __getattr__
