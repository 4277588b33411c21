"""Rows of token ids: made of text, read in any order. Knows nothing of models."""
