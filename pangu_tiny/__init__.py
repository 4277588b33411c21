"""PanGu-π Pro in JAX: the full recipe for tiny language models (arXiv 2402.02791)."""

__version__ = "0.2.0"
