"""Rounds: scoring what a model has seen, and drawing what it is to see again."""
