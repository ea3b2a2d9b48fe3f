"""Settings: declarations of options, checks by pydantic, and messages with key and line."""
