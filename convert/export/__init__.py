"""What others load: one file for each format, each exact or refused."""
