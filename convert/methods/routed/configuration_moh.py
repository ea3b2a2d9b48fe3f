"""Lends the configuration of mixtures of heads to its neighbours."""

from ..moh.configuration_moh import routed_config as routed_config
