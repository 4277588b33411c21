"""The owner of a SentencePiece model: exact both ways, refusals, and real models."""

import io
import json

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import sentencepiece

from pangu_tiny.errors import UserError
from pangu_tiny.tokenizer.model import Tokenizer, train_tokenizer

TEXTS = [f"def f{n}(a, b):\n\treturn a * {n} + b  # größer\n" for n in range(50)]
SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # SentencePiece's own stand-in for the space
any_text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters=SPACE))


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, 320)


@hypothesis.settings(max_examples=300, deadline=None, derandomize=True)
@hypothesis.given(text=any_text)
def test_any_text_survives(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("text", ["", " ", "  a  ", "\0", "a\r\nb", "\ufeffa", "Å Å ﬁ", "<s></s>"])
def test_nothing_is_normalised(tokenizer, text):
    """NFKC, trimmed or doubled spaces and a dummy prefix would each change one of these."""
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not {tokenizer.begin_id, tokenizer.end_id, tokenizer.unknown_id} & set(ids)


def test_the_space_survives_a_sample_without_one():
    assert (t := train_tokenizer(["abcabc" * 9, "bcca", "aab"], 275)).decode(
        t.encode("a b")
    ) == "a b"


def test_digits_stay_apart_and_runs_of_spaces_join():
    numbered = train_tokenizer(["1234 abcd " * 20, "ab 12", "cd 34"], 275)
    assert len(numbered.encode("1234")) == 4 > len(numbered.encode("abcd"))
    indented = train_tokenizer(["if a:\n        b\n" * 20], 276)
    assert len(indented.encode(" " * 8)) < 8


def test_the_same_sample_gives_the_same_model(tokenizer):
    assert train_tokenizer(iter(TEXTS), 320).model_bytes == tokenizer.model_bytes
    assert train_tokenizer(TEXTS[1:], 320).digest != tokenizer.digest


def test_batches_equal_single_texts(tokenizer):
    batch = tokenizer.encode_batch(TEXTS)
    assert [list(ids) for ids in batch] == [tokenizer.encode(text) for text in TEXTS]
    assert batch[0].dtype == np.int32


@pytest.mark.parametrize("vocab_size", [275, 280, 600])
def test_an_alphabet_larger_than_the_vocabulary_leaves_room(vocab_size):
    """1,000 letters, of which SentencePiece by itself would want 999 as pieces."""
    letters = [chr(0x4E00 + n) for n in range(1000)]
    sample = ["".join(letters), *(letters[n % 7] + letters[n % 3] for n in range(4000))]
    trained = train_tokenizer(sample, vocab_size)
    assert trained.vocab_size == vocab_size
    assert all(trained.decode(trained.encode(text)) == text for text in sample)
    merged = [trained.piece(i) for i in range(259, vocab_size)]
    assert any(len(piece) > 1 for piece in merged)


def test_chinese_fits_a_thousand_pieces(real_data):
    lines = (real_data / "corpora" / "zh_modern.jsonl").open(encoding="utf-8")
    texts = [json.loads(next(lines))["text"] for _ in range(200)]
    trained = train_tokenizer(texts, 1024)
    assert trained.vocab_size == 1024
    assert all(trained.decode(ids.tolist()) == t for t, ids in zip(
        texts, trained.encode_batch(texts), strict=True
    ))  # fmt: skip


@pytest.mark.parametrize(
    ("texts", "vocab_size", "named"),
    [
        (TEXTS, 100, "vocab_size is 100, expected at least 275"),
        (["ab"], 2000, "vocab_size = 2000 does not fit a text sample of 2 characters"),
        (["", ""], 300, "no text to train a tokenizer on"),
    ],
)
def test_samples_and_sizes_that_do_not_fit_are_refused(texts, vocab_size, named):
    with pytest.raises(UserError, match=named):
        train_tokenizer(texts, vocab_size)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", r"a\.model is empty, expected a SentencePiece model"),
        (
            b"no model at all",
            r"is not a SentencePiece model \(SentencePiece: INTERNAL: .*\)$",
        ),
        (
            b"IQ== 0\nIg== 1\n",
            r"model \(SentencePiece: INTERNAL: unk is not defined\.\)$",
        ),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:a\n",
            "is a git-lfs pointer, not",
        ),
    ],
    ids=str,
)
def test_files_that_are_no_model_are_refused(tmp_path, content, match):
    """In one line, with SentencePiece's own reason."""
    (tmp_path / "a.model").write_bytes(content)
    with pytest.raises(UserError, match=match) as raised:
        Tokenizer.open(tmp_path / "a.model")
    assert "\n" not in str(raised.value)
    with pytest.raises(UserError, match="does not exist"):
        Tokenizer.open(tmp_path / "b.model")
    with pytest.raises(UserError, match="does not exist"):
        Tokenizer.open(tmp_path)


@hypothesis.settings(max_examples=200, deadline=None, derandomize=True)
@hypothesis.given(data=st.data())
def test_a_damaged_model_is_refused_or_works(tokenizer, data):
    """Whatever bytes are damaged: a piece that is no UTF-8 would fail in some text only."""
    content = bytearray(tokenizer.model_bytes)
    for place in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=3)):
        content[place] ^= data.draw(st.integers(1, 255))
    try:
        damaged = Tokenizer(bytes(content))
    except UserError as error:
        assert "\n" not in str(error)
        return
    damaged.decode(range(damaged.pieces))


@pytest.mark.parametrize(("flag", "named"), [("bos_id", "begin mark"), ("eos_id", "end mark")])
def test_a_model_without_a_mark_says_which(flag, named):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_writer=model, model_type="bpe", vocab_size=60,
        minloglevel=2, **{flag: -1},
    )  # fmt: skip
    tokenizer = Tokenizer(model.getvalue(), "small.model")
    with pytest.raises(UserError, match=rf"small\.model has no {named}"):
        _ = tokenizer.begin_id, tokenizer.end_id


@pytest.mark.parametrize(
    ("name", "vocab_size", "marks", "ids"),
    [
        ("internlm_v7_sft", 103168, (1, 2), [9843, 328, 2028]),
        ("mistral_v1_32000", 32000, (1, 2), [22557, 28725, 1526]),
    ],
)
def test_real_models(real_data, name, vocab_size, marks, ids):
    tokenizer = Tokenizer.open(real_data / "tokenizers" / f"{name}.model")
    assert tokenizer.vocab_size == vocab_size
    assert (tokenizer.begin_id, tokenizer.end_id) == marks
    assert tokenizer.encode("Hello, world") == ids
    assert tokenizer.decode(ids) == "Hello, world"
    assert tokenizer.piece(3) == "<0x00>"
