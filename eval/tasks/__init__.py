"""Benchmark tasks of the lm-evaluation-harness: which ones, their documents, running them, and scores side by side."""
