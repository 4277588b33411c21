"""Devices and processes: meshes, the rules that lay logical axes on them. Knows no model."""
