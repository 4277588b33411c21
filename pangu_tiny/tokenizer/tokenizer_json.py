"""A tokenizer.json of Hugging Face, for a model whose vocabulary was left whole."""

from collections.abc import Sequence

from pangu_tiny.errors import UserError, failing_as


class TokenizerJson:
    """Text to ids and back, by the library `tokenizers`; messages say the name."""

    def __init__(self, content: bytes, name: str):
        self.name = name
        try:
            import tokenizers
        except ImportError as error:
            raise UserError(
                f"tokenizer {name} is a tokenizer.json, which needs tokenizers:"
                " pip install 'pangu_tiny[hf]'"
            ) from error
        # The library has no type of its own for its errors.
        with failing_as(f"tokenizer {name} is not a tokenizer.json", library="tokenizers"):
            self._tokenizer = tokenizers.Tokenizer.from_str(content.decode())
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    @property
    def vocab_size(self) -> int:
        """The number of ids that a model has to know: every id that is emitted is below it."""
        return max(self._tokenizer.get_vocab().values(), default=-1) + 1

    def piece(self, token_id: int) -> str | None:
        """The text of an id; None where there is no such id."""
        return self._tokenizer.id_to_token(token_id)

    def encode(self, text: str, marks: bool = False) -> list[int]:
        """The ids of a text, with the marks that its own rules add, or without, unless these are
        spelt out in it."""
        refused = f"tokenizer {self.name} cannot encode {text!r}"
        with failing_as(refused, library="tokenizers"):
            return self._tokenizer.encode(text, add_special_tokens=marks).ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some ids; marks have none."""
        return self._tokenizer.decode([int(i) for i in ids])
