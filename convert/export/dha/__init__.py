"""Exports of decoupled heads (method dha)."""
