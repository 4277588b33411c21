"""Training: the stage, and what it writes. Knows nothing of tokenizers."""
