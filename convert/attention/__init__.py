"""The attention of one layer: weights, projections, rotary embeddings, statistics, and linear algebra. Pure."""
