"""Timing of prefill and decoding of a converted model and its donor."""
