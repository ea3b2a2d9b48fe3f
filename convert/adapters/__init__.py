"""Folders with adapters: created, read, merged. What an adapter computes is in `convert/methods/hydra`."""
