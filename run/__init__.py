"""A whole run as one file: convert, heal, evaluate, export, push."""
