"""The model: its shape, layers, attention, random initialisation. Knows nothing of files."""
