"""Storage: reading and writing of safetensors, atomic files, output folders."""
