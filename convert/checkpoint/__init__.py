"""The metadata of a converted checkpoint: method, origin, hashes, front matter of its model card."""
