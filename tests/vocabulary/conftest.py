"""A tokenizer of 600 pieces, its counts, and cuts of it."""

import numpy as np
import pytest

from pangu_tiny.model.shape import ModelShape
from pangu_tiny.tokenizer.model import Tokenizer, train_tokenizer
from pangu_tiny.vocabulary.compress_tokenizer import compress_tokenizer
from pangu_tiny.vocabulary.count_tokens import count_tokens

_SYLLABLES = ["the", "re", "in", "st", "and", "er", "größ", "世界", "世", "🙂", "ing", "ion"]


@pytest.fixture(scope="session")
def many_texts():
    """600 documents of made-up words, most of them rare."""
    random = np.random.default_rng(1)
    words = ["".join(random.choice(_SYLLABLES, random.integers(1, 4))) for _ in range(500)]
    frequency = 1 / np.arange(1, 501)
    frequency /= frequency.sum()
    return [
        f"{i} " + " ".join(random.choice(words, random.integers(5, 40), p=frequency))
        for i in range(600)
    ]


@pytest.fixture(scope="session")
def big(many_texts):
    return train_tokenizer(many_texts, 600)


@pytest.fixture(scope="session")
def big_file(big, tmp_path_factory):
    file = tmp_path_factory.mktemp("big") / "big.model"
    file.write_bytes(big.model_bytes)
    return str(file)


@pytest.fixture(scope="session")
def many_file(many_texts, write_jsonl, tmp_path_factory):
    return write_jsonl(tmp_path_factory.mktemp("many") / "many.jsonl", many_texts)


@pytest.fixture(scope="session")
def big_counts(many_file, big_file, tmp_path_factory):
    workdir = str(tmp_path_factory.mktemp("counts") / "c")
    count_tokens(workdir, many_file, big_file, held_out_fraction=0.2, processes=1)
    return workdir


@pytest.fixture(scope="session")
def compress(big_counts, big_file, many_file):
    """compress-tokenizer; returns its report and the compact tokenizer."""

    def compress(workdir, **changes):
        settings = {
            "counts": big_counts,
            "tokenizer": big_file,
            "model": ModelShape(depth=4, width=64, heads=2, ffn_width=128, vocab_size=400),
            "text": many_file,
        } | changes
        found = compress_tokenizer(workdir=str(workdir), **settings)
        return found, Tokenizer.open(workdir / "tokenizer.model")

    return compress
