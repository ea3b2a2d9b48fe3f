"""Grouped-query attention with fewer groups: neighbouring K and V heads averaged."""
