"""Unknown text is counted as text: by what SentencePiece itself says of every piece."""

import io
import json
import shutil

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from pangu_tiny.data.dataset import TokenDataset
from pangu_tiny.model.shape import ModelShape
from pangu_tiny.tokenizer.model import Tokenizer
from pangu_tiny.tokenizer.unknown import text_bytes, unknown_bytes, unknown_share
from pangu_tiny.vocabulary.compress_tokenizer import compress_tokenizer
from pangu_tiny.vocabulary.count_tokens import count_tokens
from pangu_tiny.vocabulary.remap_dataset import remap_dataset

_LETTERS = "abc \n\t世é\u0301①ﬀ🙂、　▁\u200b각ᄀ"  # known, unknown, and what a normaliser changes


def train(**settings):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["ab cab aé cc 1 ff bac", "abba ac ca cab é 1"] * 20),
        model_writer=model, minloglevel=2, hard_vocab_limit=False, **settings,
    )  # fmt: skip
    return Tokenizer(model.getvalue())


@pytest.fixture(scope="module")
def tokenizers():
    identity = {"normalization_rule_name": "identity"}
    return {
        "bpe": train(model_type="bpe", vocab_size=24, **identity, remove_extra_whitespaces=False),
        "unigram": train(model_type="unigram", vocab_size=24),
        "suffix": train(model_type="bpe", vocab_size=24, treat_whitespace_as_suffix=True),
        "bytes": train(model_type="bpe", vocab_size=290, byte_fallback=True),
    }


@settings(max_examples=100, deadline=None)
@given(texts=st.lists(st.text(_LETTERS, min_size=1), min_size=1, max_size=4))
@pytest.mark.parametrize("kind", ["bpe", "unigram", "suffix", "bytes"])
def test_it_is_what_no_other_piece_writes(tokenizers, kind, texts):
    tokenizer = tokenizers[kind]
    processor = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model_bytes)
    ids = tokenizer.encode_batch(texts)
    pieces = [
        # An unknown piece is named by the text that it stands for.
        list(zip(ids_t.tolist(), processor.encode(text, out_type=str), strict=True))
        for ids_t, text in zip(ids, texts, strict=True)
    ]
    expected = [
        sum(len(piece.replace("▁", " ").encode()) for i, piece in found if i == 0)
        for found in pieces
    ]
    unknown = unknown_bytes(tokenizer, texts, ids)
    assert unknown.tolist() == expected
    times = np.bincount(np.concatenate(ids), minlength=tokenizer.pieces)
    lone = sum(piece.startswith("<0x") for found in pieces for _, piece in found)
    written = sum(
        1 if piece.startswith("<0x") else len(piece.replace("▁", " ").encode())
        for found in pieces
        for _, piece in found
    )
    assert text_bytes(tokenizer, times, int(unknown.sum())) == {
        "normalised_bytes": written,
        "unknown_bytes": sum(expected) + lone,
    }


@pytest.fixture(scope="module")
def prepared(tokenizers, prepare, write_jsonl, tmp_path_factory):
    """A dataset by a tokenizer without byte fallback, half of whose source "zh" is unknown."""
    folder = tmp_path_factory.mktemp("unknown")
    (folder / "bpe.model").write_bytes(tokenizers["bpe"].model_bytes)
    text = {
        "en": write_jsonl(folder / "en.jsonl", [f"cab {'a' * i}" for i in range(40)]),
        "zh": write_jsonl(folder / "zh.jsonl", [f"ab{'b' * i} {'世' * i}" for i in range(40)]),
    }
    return folder, text, prepare(text, folder / "data", tokenizer=str(folder / "bpe.model"))


def test_it_is_told_by_source_and_split(prepared, prepare, capsys):
    folder, text, dataset = prepared
    prepare(text, folder / "data", tokenizer=str(folder / "bpe.model"))
    out = capsys.readouterr().out
    for split in dataset.description["splits"].values():
        assert split["sources"]["en"]["unknown_bytes"] == 0
        assert split["unknown_bytes"] == split["sources"]["zh"]["unknown_bytes"] > 0
    share = unknown_share(*(s["sources"]["zh"] for s in dataset.description["splits"].values()))
    # A space, the one before the text, and i + 2 letters stand beside i characters of 3 bytes.
    assert share == sum(3 * i for i in range(40)) / sum(4 * i + 4 for i in range(40))
    assert f"  WARNING: {share:.2%} of the text of zh is unknown to the tokenizer" in out
    assert "text of en" not in out


def test_counts_of_text_and_of_its_dataset_agree(prepared, capsys):
    folder, text, dataset = prepared
    file = str(folder / "bpe.model")
    found = count_tokens(
        str(folder / "text"), text, file, held_out_fraction=0.2, processes=1, unit_bytes=1024
    )
    assert "WARNING: " in capsys.readouterr().out
    again = count_tokens(str(folder / "rows"), dataset=dataset.path, processes=1)
    assert "WARNING: " in capsys.readouterr().out
    for name in text:
        for kind in ("normalised_bytes", "unknown_bytes"):
            told = dataset.description["splits"]["train"]["sources"][name][kind]
            assert found["sources"][name][kind] == again["sources"][name][kind] == told


@pytest.fixture(scope="module")
def cut(prepared):
    """A smaller tokenizer."""
    folder, _, dataset = prepared
    count_tokens(str(folder / "counts"), dataset=dataset.path, processes=1)
    shape = ModelShape(depth=1, width=8, heads=1, ffn_width=8, vocab_size=16)
    compress_tokenizer(
        str(folder / "counts"), str(folder / "bpe.model"), str(folder / "cut"), shape,
        vocab_size=16, method="unused",
    )  # fmt: skip
    return folder / "cut"


def test_a_remapped_dataset_tells_what_text_would(prepared, cut, prepare, tmp_path):
    """Though it is made of ids, which do not tell how much text is unknown."""
    _, text, dataset = prepared
    remap_dataset(dataset.path, str(cut), str(tmp_path / "mapped"), processes=1)
    again = prepare(text, tmp_path / "again", tokenizer=str(cut / "tokenizer.model"))
    assert TokenDataset.open(tmp_path / "mapped").description == again.description


def test_a_dataset_of_an_earlier_version_does_not_tell(prepared, cut, prepare, tmp_path, capsys):
    folder, text, dataset = prepared
    file = shutil.copytree(dataset.path, tmp_path / "data") / "dataset.json"
    old = json.loads(file.read_text())
    for entries in old["splits"].values():
        for entry in (entries, *entries["sources"].values(), *entries["shards"]):
            del entry["normalised_bytes"], entry["unknown_bytes"]
    file.write_text(json.dumps(old))
    prepare(text, file.parent, tokenizer=str(folder / "bpe.model"))
    count_tokens(str(tmp_path / "rows"), dataset=str(file.parent), processes=1)
    remap_dataset(str(file.parent), str(cut), str(tmp_path / "mapped"), processes=1)
    assert "of the text of" not in capsys.readouterr().out
    mapped = TokenDataset.open(tmp_path / "mapped").description["splits"]["train"]
    assert mapped["normalised_bytes"] > mapped["unknown_bytes"] == 0
