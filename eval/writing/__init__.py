"""How a model writes: texts of its own, beside its donor's."""
