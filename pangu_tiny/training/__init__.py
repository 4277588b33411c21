"""Training: step, loop, optimizer, checkpoints, metrics. Knows nothing of tokenizers."""
