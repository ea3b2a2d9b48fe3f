"""Loading a checkpoint in a process without mhconvert, as its users do."""
