"""The mathematics of an attention layer: weights, projections, rotary embeddings, statistics, linear algebra."""
