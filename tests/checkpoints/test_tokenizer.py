"""The tokenizer in a checkpoint: what it is, and what is said where it is of no use."""

import sys
from types import SimpleNamespace

import pytest
from etils import epath
from shapes import TINY

from pangu_tiny.checkpoints.read import Checkpoint
from pangu_tiny.errors import UserError
from pangu_tiny.tokenizer.model import Tokenizer

UNKNOWN = b'{"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "<unk>"}}'


def holding(content):
    about = {"identity": {"tokenizer": "0" * 64}, "step": 0, "sequence_length": 9}
    return Checkpoint(epath.Path("runs/m/checkpoints/0"), TINY, about, content)


def refusal(call, *arguments):
    with pytest.raises(UserError) as raised:
        call(*arguments)
    assert "\n" not in str(raised.value) and "checkpoint runs/m/checkpoints/0" in str(raised.value)
    return str(raised.value)


def test_a_sentencepiece_model(tokenizer):
    found = holding(tokenizer.model_bytes)
    for opened in (found.tokenizer(), found.sentencepiece()):
        assert isinstance(opened, Tokenizer) and opened.encode("ab") == tokenizer.encode("ab")


@pytest.mark.parametrize("content", [UNKNOWN, b"\n  " + UNKNOWN])
def test_a_tokenizer_json(content):
    found = holding(content)
    assert found.tokenizer().encode("a") == [0] and found.tokenizer().vocab_size == 1
    assert "with its vocabulary whole" in refusal(found.sentencepiece)
    assert "(tokenizers: WordLevel error: " in refusal(found.tokenizer().encode, "b")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"{}", "is not a tokenizer.json (tokenizers: Model missing"),
        (UNKNOWN[:-9], "is not a tokenizer.json (tokenizers: EOF"),
        (b'{"\xff": 1}', "is not a tokenizer.json (tokenizers: 'utf-8' codec"),
        (b"IQ== 0\nIg== 1\n", "is not a SentencePiece model (SentencePiece: INTERNAL: unk is not"),
        (b"", "is empty"),
    ],
)
def test_what_is_none(content, said):
    assert said in refusal(holding(content).tokenizer)


def test_without_the_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    assert "pip install 'pangu_tiny[hf]'" in refusal(holding(UNKNOWN).tokenizer)


def test_no_rows_can_be_prepared_for_a_whole_vocabulary(tokenizer):
    """Where they can, that is what is said."""
    rows = SimpleNamespace(path="data", tokenizer_digest="1" * 64, sequence_length=9)
    assert "with its vocabulary whole" in refusal(holding(UNKNOWN).check_rows, rows)
    said = refusal(holding(tokenizer.model_bytes).check_rows, rows)
    assert "prepare the text in its own ids" in said
