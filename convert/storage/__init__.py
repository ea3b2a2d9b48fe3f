"""Files: reading and writing safetensors, folders that appear when they are whole."""
