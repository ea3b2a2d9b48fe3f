"""Texts longer than a model was trained on, read without training."""
