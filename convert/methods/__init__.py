"""The conversion methods, one folder each, and their registry."""
