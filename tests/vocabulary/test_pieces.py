"""How pieces come about: the same as SentencePiece does it, on any vocabulary."""

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from pangu_tiny.errors import UserError
from pangu_tiny.tokenizer import proto
from pangu_tiny.tokenizer.model import Tokenizer
from pangu_tiny.vocabulary.pieces import Vocabulary


def test_fields_that_are_not_described_stay(big, real_data):
    files = (real_data / "tokenizers").glob("*.model")
    for data in (big.model_bytes, *(file.read_bytes() for file in files)):
        written = proto.parse(data).SerializeToString()
        assert len(written) == len(data)  # in another order, where fields are unknown
        assert proto.parse(written) == proto.parse(data)


@hypothesis.given(
    pieces=st.lists(st.text("and", min_size=2, max_size=5), max_size=12, unique=True),
    scores=st.lists(st.integers(-4, 0), min_size=12, max_size=12),
    unused=st.sets(st.integers(0, 11)),
    text=st.text("and", max_size=12),
)
@hypothesis.settings(max_examples=300)
def test_any_text_is_merged_as_sentencepiece_merges_it(big, pieces, scores, unused, text):
    """Scores with ties, in no order, pieces that cannot be reached, unused ones among them."""
    base = [i for i, kind in enumerate(big.kinds) if kind != proto.NORMAL]
    base += [Vocabulary.of(big).ids[c] for c in "and\u2581"]
    model = type(big.proto).FromString(big.select(base).model_bytes)
    for i, piece in enumerate(pieces):
        kind = proto.UNUSED if i in unused else proto.NORMAL
        model.pieces.add(piece=piece, score=scores[i], type=kind)
    model.trainer_spec.vocab_size = len(model.pieces)
    tokenizer = Tokenizer(model.SerializeToString())
    vocabulary = Vocabulary.of(tokenizer)
    assert vocabulary.emit(text) == tokenizer.encode(text)
    normal = vocabulary.kinds == proto.NORMAL
    np.testing.assert_array_equal(vocabulary.unreachable & normal, tokenizer.unreachable)
    for piece, i in vocabulary.ids.items():
        if not vocabulary.unreachable[i] and len(piece) > 1:
            left, right = (vocabulary.pieces[part] for part in vocabulary.parts[i])
            assert left + right == piece


def test_dead_pieces_of_a_real_tokenizer(real_data):
    tokenizer = Tokenizer.open(real_data / "tokenizers" / "internlm_v7_sft.model")
    vocabulary = Vocabulary.of(tokenizer)
    assert vocabulary.unreachable.sum() == 41  # 40 that merge into something else, and a NUL
    assert vocabulary.pieces[354] == "\0" and vocabulary.unreachable[354]
    np.testing.assert_array_equal(vocabulary.unreachable, tokenizer.unreachable)


def test_characters_without_a_piece_become_bytes(big):
    vocabulary = Vocabulary.of(big)
    for text in ("é", "\0", "🜚世", "the é"):
        assert vocabulary.emit(text.replace(" ", "\u2581")) == big.encode(text)


def test_a_piece_around_a_user_defined_one_is_dead(big):
    model = type(big.proto).FromString(big.model_bytes)
    for piece, kind in (("<x>", proto.USER_DEFINED), ("a<x>", proto.NORMAL)):
        model.pieces.add(piece=piece, score=0.0, type=kind)
    vocabulary = Vocabulary.of(Tokenizer(model.SerializeToString()))
    assert vocabulary.unreachable[-1]
    assert not vocabulary.merging[-2]


def test_unigram_models_are_refused(real_data):
    file = real_data / "tokenizers" / "chinese_llama_sp20000_unigram.model"
    with pytest.raises(UserError, match="is a Unigram model, expected BPE"):
        Vocabulary.of(Tokenizer.open(file))
