"""Windowed layers in stock classes."""
