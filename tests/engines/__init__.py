"""Exports in a real serving engine, which is installed apart: `make test-vllm`."""
