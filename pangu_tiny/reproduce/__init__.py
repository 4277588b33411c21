"""Whole recipes, from text to report."""
