"""The pieces of a BPE model, and how SentencePiece makes each: which two parts it merges last.

There is no list of merges. Any two neighbours whose concatenation is a piece may merge; the
highest score goes first, ties go to the left. So a piece is reachable if merging its own characters
gives the piece again, and then the last merge tells its two parts, which are reachable themselves.
A vocabulary in which every piece has its parts reaches all of them, by the same merges.
"""

import dataclasses
import functools
import re

import numpy as np

from pangu_tiny.errors import UserError
from pangu_tiny.tokenizer import proto
from pangu_tiny.tokenizer.model import Tokenizer

_KINDS = {proto.UNIGRAM: "Unigram", proto.WORD: "word", proto.CHAR: "character"}


@dataclasses.dataclass(frozen=True, eq=False)
class Vocabulary:
    """All pieces of a model, by id.

    Attributes:
      pieces: the texts.
      scores: float [n], the priorities.
      kinds: int [n], the types, see `tokenizer/proto.py`.
      byte_fallback: whether a character that is no piece becomes its UTF-8 bytes.
    """

    pieces: tuple[str, ...]
    scores: np.ndarray
    kinds: np.ndarray
    byte_fallback: bool

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> "Vocabulary":
        """The pieces of a tokenizer."""
        model = tokenizer.proto
        if (kind := model.trainer_spec.model_type) != proto.BPE:
            found = _KINDS.get(kind, "strange")
            raise UserError(
                f"tokenizer {tokenizer.name} is a {found} model, expected BPE, where a piece is"
                " merged from others and can be taken apart again (the pieces of a Unigram model"
                " stand alone, with probabilities that would have to be estimated anew)"
            )
        scores = np.array([piece.score for piece in model.pieces])
        pieces = tuple(piece.piece for piece in model.pieces)
        return cls(pieces, scores, tokenizer.kinds, model.trainer_spec.byte_fallback)

    @functools.cached_property
    def merging(self) -> np.ndarray:
        """bool [n], the pieces that are made by merging, single characters included."""
        return np.isin(self.kinds, (proto.NORMAL, proto.UNUSED))

    @functools.cached_property
    def single(self) -> np.ndarray:
        """bool [n], the single characters among them."""
        return self.merging & np.array([len(piece) == 1 for piece in self.pieces])

    @functools.cached_property
    def parts(self) -> np.ndarray:
        """int32 [n, 2], the ids of the two pieces that a piece is merged from. −1 stands for a
        character that is no piece; a piece that is not merged from two has −1 twice."""
        return self._derivations[0]

    @functools.cached_property
    def unreachable(self) -> np.ndarray:
        """bool [n], the merging pieces that are unreachable: no text is encoded as them."""
        return self._derivations[1]

    @functools.cached_property
    def split_tokens(self) -> np.ndarray:
        """int [n], how many tokens come of a piece that is taken apart once: its parts, a
        character that is no piece counted in bytes."""
        tokens = np.ones(len(self.pieces), int)
        for i in np.flatnonzero(self.merging & ~self.unreachable):
            text = self.pieces[i]
            if len(text) == 1:
                tokens[i] = len(text.encode())
                continue
            ends = zip(self.parts[i], (text[0], text[-1]), strict=True)
            tokens[i] = sum(1 if part >= 0 else len(end.encode()) for part, end in ends)
        return tokens

    @functools.cached_property
    def ids(self) -> dict[str, int]:
        """The id of each merging piece by its text."""
        return {self.pieces[i]: int(i) for i in np.flatnonzero(self.merging)}

    def merge(self, text: str) -> tuple[list[str], tuple[str, str] | None]:
        """Merges the characters of a text, of which nothing is normalised.

        Returns:
          The pieces and lone characters that are left, and the pair that was merged last.
        """
        symbols, pair = list(text), None
        while len(symbols) > 1:
            best, place = -np.inf, -1
            for i in range(len(symbols) - 1):
                score = self._priorities.get(symbols[i] + symbols[i + 1])
                if score is not None and score > best:
                    best, place = score, i
            if place < 0:
                break
            pair = (symbols[place], symbols[place + 1])
            symbols[place : place + 2] = ["".join(pair)]
        return symbols, pair

    def emit(self, text: str) -> list[int]:
        """The ids that a text becomes: `merge`, with unused pieces taken apart again and lone
        characters in bytes. Without byte fallback each is the unknown id, of which SentencePiece
        makes one where they are neighbours."""
        return [i for symbol in self.merge(text)[0] for i in self._resolve(symbol)]

    def _resolve(self, symbol: str) -> list[int]:
        i = self.ids.get(symbol)
        if i is not None and self.kinds[i] == proto.NORMAL:
            return [i]
        if len(symbol) > 1:
            left, right = self._split(symbol)
            return self._resolve(left) + self._resolve(right)
        if self.byte_fallback:
            return [self._bytes[byte] for byte in symbol.encode()]
        return [int(np.flatnonzero(self.kinds == proto.UNKNOWN)[0])]

    def _split(self, piece: str) -> tuple[str, str]:
        left = self.parts[self.ids[piece]][0]
        length = len(self.pieces[left]) if left >= 0 else 1
        return piece[:length], piece[length:]

    @functools.cached_property
    def _bytes(self) -> list[int]:
        places = {self.pieces[i]: int(i) for i in np.flatnonzero(self.kinds == proto.BYTE)}
        return [places[f"<0x{byte:02X}>"] for byte in range(256)]

    @functools.cached_property
    def _priorities(self) -> dict[str, float]:
        return {text: float(self.scores[i]) for text, i in self.ids.items()}

    @functools.cached_property
    def _derivations(self) -> tuple[np.ndarray, np.ndarray]:
        parts = np.full((len(self.pieces), 2), -1, np.int32)
        dead = np.zeros(len(self.pieces), bool)
        # These are cut out of a text before anything is merged.
        defined = [self.pieces[i] for i in np.flatnonzero(self.kinds == proto.USER_DEFINED)]
        inside = re.compile("|".join(map(re.escape, defined)) or r"(?!)")
        for text, i in self.ids.items():
            symbols, pair = self.merge(text)
            if len(symbols) > 1 or inside.search(text):
                dead[i] = True
            elif pair:
                parts[i] = [self.ids.get(part, -1) for part in pair]
        if self.byte_fallback and "\0" in self.ids:
            dead[self.ids["\0"]] = True  # SentencePiece takes it for unused
        return parts, dead
