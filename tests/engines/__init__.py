"""Exports in real serving engines, which are installed apart: `make test-vllm`, `make test-llamacpp`."""
