"""The conversion methods, one folder each, their registry, and which donors they take."""
