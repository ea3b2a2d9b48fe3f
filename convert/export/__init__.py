"""Exports in formats that other programs load, one module each; a checkpoint is held exactly or refused."""
