"""Timing of prefill and decoding, and memory."""
