"""The supported model families as data."""
