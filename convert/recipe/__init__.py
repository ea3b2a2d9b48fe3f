"""A recipe: the choices that decide what a conversion produces."""
