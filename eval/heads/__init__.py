"""Which heads carry what: what a model loses without each, which copy from far back, and which make it refuse."""
