"""The tokenizer: one owner of a SentencePiece model."""
