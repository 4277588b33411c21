"""Text in, rows of token ids out. Knows nothing of models."""
