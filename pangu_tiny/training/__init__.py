"""Training: the stage, and what it leaves behind. Knows nothing of tokenizers."""
