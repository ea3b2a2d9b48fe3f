"""From calibration text to token rows: documents, tokenization, and the rows of a conversion."""
