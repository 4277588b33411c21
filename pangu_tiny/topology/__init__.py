"""Meshes and the rules that lay logical axes on them."""
