"""Exports of latent attention (method mla)."""
