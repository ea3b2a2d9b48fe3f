"""Settings from YAML and plain values, with faults that name the key."""
