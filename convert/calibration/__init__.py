"""Calibration text: documents, token rows, and the rows of a conversion."""
