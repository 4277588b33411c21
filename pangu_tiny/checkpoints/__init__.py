"""Checkpoints on disk: read by every stage, written whole or part by part."""
