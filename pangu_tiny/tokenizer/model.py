"""The one owner of a SentencePiece model: its bytes, its ids, its marks, its cut."""

import functools
import hashlib
import io
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import sentencepiece
from etils import epath

from pangu_tiny.errors import UserError, check_number, failing_as
from pangu_tiny.git_lfs import check_no_pointer
from pangu_tiny.tokenizer import proto

_BYTES_AND_MARKS = 256 + 3  # byte-fallback pieces; unknown, begin, end
sentencepiece.set_min_log_level(2)  # it warns of a NUL piece, which many models have

_COVERAGE = 0.9995  # of the characters in the sample; SentencePiece's own default


class Tokenizer:
    """A SentencePiece model of any kind (BPE or unigram, with byte fallback or without).

    Attributes:
      model_bytes: the serialised model, byte for byte as it was read.
      name: where it was read from, for messages.
    """

    def __init__(self, model_bytes: bytes, name: str = "the given bytes"):
        self.model_bytes = model_bytes
        self.name = name
        if not model_bytes:
            raise UserError(f"tokenizer {name} is empty, expected a SentencePiece model")
        self._processor = sentencepiece.SentencePieceProcessor()
        refused = f"tokenizer {name} is not a SentencePiece model"
        wrong = (RuntimeError, OSError, UnicodeDecodeError)
        with failing_as(refused, *wrong, library="SentencePiece"):
            self._processor.LoadFromSerializedProto(model_bytes)
            # A damaged piece that is not UTF-8 would show only in the texts that have it.
            self._processor.id_to_piece(list(range(self._processor.get_piece_size())))

    def __reduce__(self) -> tuple[Any, ...]:
        return Tokenizer, (self.model_bytes, self.name)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> "Tokenizer":
        """Reads a model file from a local path or a URL that epath knows (gs://, s3://)."""
        file = epath.Path(path)
        if not file.is_file():
            raise UserError(f"tokenizer {path} does not exist, expected a SentencePiece model file")
        model_bytes = file.read_bytes()
        check_no_pointer(path, model_bytes)
        return cls(model_bytes, name=str(path))

    @functools.cached_property
    def digest(self) -> str:
        """sha256 of the model's bytes, in hexadecimal."""
        return hashlib.sha256(self.model_bytes).hexdigest()

    @functools.cached_property
    def proto(self) -> Any:
        """The model as a message (see `tokenizer/proto.py`), to be read only."""
        return proto.parse(self.model_bytes)

    @functools.cached_property
    def kinds(self) -> np.ndarray:
        """int [pieces], the type of each piece, one of those in `tokenizer/proto.py`."""
        return np.array([piece.type for piece in self.proto.pieces])

    @property
    def pieces(self) -> int:
        """The number of pieces in the model, those that are never emitted included."""
        return self._processor.get_piece_size()

    @functools.cached_property
    def vocab_size(self) -> int:
        """The number of ids that a model has to know: every id that is emitted is below it.

        Unused pieces at the end of a vocabulary, through which others merge, are above it.
        """
        return int(np.flatnonzero(self.kinds != proto.UNUSED)[-1]) + 1

    @property
    def begin_id(self) -> int:
        """The mark that opens every document (bos)."""
        return self._mark(self._processor.bos_id(), "begin mark (bos)")

    @property
    def end_id(self) -> int:
        """The mark that closes every document (eos)."""
        return self._mark(self._processor.eos_id(), "end mark (eos)")

    @property
    def unknown_id(self) -> int:
        """What a character that the model cannot write becomes."""
        return self._processor.unk_id()

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without marks."""
        return self._processor.encode(text)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of each text as an int32 array, without marks, on the calling thread."""
        return self._processor.encode_as_numpy(list(texts), num_threads=1)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some ids; marks have none."""
        return self._processor.decode([int(i) for i in ids])

    def normalize(self, text: str) -> str:
        """The text as it is before it is cut into pieces, with U+2581 for a space."""
        return self._processor.normalize(text)

    @functools.cached_property
    def written_bytes(self) -> np.ndarray:
        """int64 [pieces], the UTF-8 bytes of the normalised text that each piece stands for, of a
        space one; of the unknown piece 0, since it stands for whatever no other does."""
        sizes = [len(piece.piece.replace(proto.SPACE, " ").encode()) for piece in self.proto.pieces]
        return np.select(
            [self.kinds == proto.UNKNOWN, self.kinds == proto.BYTE], [0, 1], np.array(sizes)
        )

    @functools.cached_property
    def unreachable(self) -> np.ndarray:
        """bool [pieces], the normal pieces that are unreachable: encoding their own text, without
        normalisation, yields other ids."""
        bare = proto.parse(self.model_bytes)
        bare.normalizer_spec.CopyFrom(
            type(bare.normalizer_spec)(add_dummy_prefix=False, remove_extra_whitespaces=False)
        )
        bare.ClearField("self_test_data")
        texts = [piece.piece for piece in bare.pieces]
        found = Tokenizer(bare.SerializeToString(), self.name).encode_batch(texts)
        alive = np.array([len(ids) == 1 and ids[0] == i for i, ids in enumerate(found)])
        return (self.kinds == proto.NORMAL) & ~alive

    def piece(self, token_id: int) -> str:
        """The piece as SentencePiece writes it: U+2581 for a space, <0x0A> for a lone byte."""
        return self._processor.id_to_piece(int(token_id))

    def select(self, kept: Iterable[int], unused: Iterable[int] = ()) -> "Tokenizer":
        """The model with only some of its pieces, which keep text, score and type.

        Args:
          kept: ids, in the order that they are to have.
          unused: ids of pieces that follow them and are merged through but never emitted.
        """
        kept, edited = list(kept), type(self.proto)()
        edited.CopyFrom(self.proto)
        del edited.pieces[:]
        for token_id in (*kept, *unused):
            edited.pieces.add().CopyFrom(self.proto.pieces[token_id])
        for piece in edited.pieces[len(kept) :]:
            piece.type = proto.UNUSED
        spec = edited.trainer_spec
        spec.vocab_size = len(edited.pieces)
        places = {int(token_id): place for place, token_id in enumerate(kept)}
        for name in ("unk_id", "bos_id", "eos_id", "pad_id"):
            setattr(spec, name, places.get(getattr(spec, name), -1))
        edited.ClearField("self_test_data")  # samples of what the whole model emits
        return Tokenizer(edited.SerializeToString(), name=f"{len(kept)} pieces of {self.name}")

    def _mark(self, token_id: int, what: str) -> int:
        if token_id < 0:
            raise UserError(f"tokenizer {self.name} has no {what}; every document needs one")
        return token_id


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Trains a BPE model with byte fallback, for which decode(encode(text)) == text.

    Nothing is normalised, no space is added or removed; runs of spaces become pieces, digits stay
    apart, newlines and tabs are always in the alphabet. (The one text that does not survive is
    U+2581, which SentencePiece itself uses for the space.) The same texts give the same bytes.

    Args:
      texts: a sample of documents; it is held in memory.
      vocab_size: number of pieces, the 256 byte pieces and three marks included.
    """
    texts = [text for text in texts if text]
    check_number("prepare_data.vocab_size", vocab_size, _BYTES_AND_MARKS + 16)  # some letters
    if not texts:
        raise UserError("no text to train a tokenizer on, expected at least one document")
    model = io.BytesIO()
    sentences = _split_at_rare_characters(texts, (vocab_size - _BYTES_AND_MARKS) // 2)
    sample = f"a text sample of {sum(map(len, texts)):,} characters"
    refused = f"vocab_size = {vocab_size} does not fit {sample}"
    with failing_as(refused, RuntimeError, OSError, library="SentencePiece"):
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            character_coverage=1.0,
            # Without a piece for the space, its bytes would be those of SentencePiece's stand-in.
            required_chars=f"\n\t{proto.SPACE}",
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            # Longer sentences would be left out without a word.
            max_sentence_length=2**30,
            # The number of threads is written into the model, so it must not follow the machine.
            num_threads=4,
            minloglevel=2,
        )
    return Tokenizer(model.getvalue(), name="just trained")


def _split_at_rare_characters(texts: Sequence[str], largest_alphabet: int) -> list[str]:
    """The texts without the characters that no piece is to hold, which are written in bytes.

    SentencePiece takes whole characters into the vocabulary until a coverage is reached, fails
    where they do not fit (Chinese with 1,024 pieces), and allows no coverage below 0.98. So the
    alphabet is chosen here: it reaches the coverage, or leaves half of the room to merged pieces.
    """
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(text)
    ranked = sorted(counts, key=lambda character: (-counts[character], character))
    covered, size = 0, 0
    while size < min(len(ranked), largest_alphabet) and covered < _COVERAGE * counts.total():
        covered += counts[ranked[size]]
        size += 1
    if not (rare := "".join(ranked[size:])):
        return list(texts)
    pattern = re.compile(f"[{re.escape(rare)}]+")
    return [part for text in texts for part in pattern.split(text) if part]
