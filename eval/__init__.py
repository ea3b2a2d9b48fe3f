"""Measuring models: fidelity to a donor, cost, and reports of both."""
