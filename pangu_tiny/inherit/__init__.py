"""Inheritance: a small model cut out of a big one, by what matters in it."""
