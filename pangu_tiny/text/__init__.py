"""Text in, whatever it is stored as. Knows no tokenizer."""
