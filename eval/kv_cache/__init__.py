"""Key-value caches that store codes of a few bits: the rival of a conversion at equal bytes."""
