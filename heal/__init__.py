"""Training that repairs a converted model, layer-local or end to end."""
