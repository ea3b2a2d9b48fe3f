"""The supported model families as data, and the checks that a donor has to pass."""
