"""What a converted checkpoint says of itself: method, origin, hashes, model card."""
