"""The compact tokenizer: what a corpus uses of a big vocabulary, and datasets in its ids."""
