"""A donor: its reference resolved to config, tokenizer and lazily read tensors."""
