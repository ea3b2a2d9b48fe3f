"""Calibration data: documents, their tokens, and the rows of a conversion."""
