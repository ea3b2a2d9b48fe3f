"""Adapter folders: written new beside a donor, read, merged. What an adapter computes is in `convert/methods/hydra`."""
