"""What is known of each supported model family, and what is refused."""
