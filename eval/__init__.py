"""Evaluation of models: fidelity to the donor, tasks, retrieval, cache size, speed, and reports of them."""
