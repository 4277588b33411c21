"""Text in the two tokenizers of a recipe."""

import os
from collections.abc import Callable
from typing import Any, NamedTuple

from etils import epath

from pangu_tiny import config
from pangu_tiny.data.dataset import TokenDataset
from pangu_tiny.data.prepare_data import prepare_data
from pangu_tiny.reproduce.agenda import Step
from pangu_tiny.reproduce.corpus import write_python_library
from pangu_tiny.rounds.stages import run
from pangu_tiny.text.sources import Text
from pangu_tiny.tokenizer.model import Tokenizer
from pangu_tiny.vocabulary.compress_tokenizer import compress_tokenizer
from pangu_tiny.vocabulary.count_tokens import count_tokens


class Rows(NamedTuple):
    """Workdirs of prepare-data, of the same text: in the ids of the big tokenizer, which is None
    where rows are given, and in those of the compact one."""

    big: str | None
    compact: str


def prepare_text(
    folder: epath.Path,
    text: Text | None,
    big_vocab: int | None,
    given_tokenizer: str | None,
    check: Callable[[Rows], None],
) -> tuple[list[Step], Rows]:
    """The stages of text.

    Args:
      text: None is the library of this Python installation.
      given_tokenizer: the big one; None is the one that is bound for prepare-data, or is trained
        there.
      check: called with the rows as soon as they are there.
      big_vocab: of the models that take the big tokenizer; a tokenizer that is bound and has more
        pieces is cut to as many first.
    """
    corpus: Any = os.fspath(folder / "corpus.jsonl") if text is None else text
    rows = Rows(os.fspath(folder / "big_data"), os.fspath(folder / "data"))
    given, _ = config.arguments(prepare_data, text=corpus, workdir=rows.big)
    reading = {name: value for name, value in given.items() if name == "text_key"}
    tokenizer, steps = given.get("tokenizer"), []

    def cut(counts: str, tokenizer: str, workdir: str, **size: Any) -> Any:
        return run(
            "",
            compress_tokenizer,
            workdir=os.fspath(folder / workdir),
            counts=os.fspath(folder / counts),
            tokenizer=tokenizer,
            text=corpus,
            **size,
            **reading,
        )

    if text is None:
        library = epath.Path(corpus)
        steps.append(Step("the library of Python", lambda: write_python_library(library)))
    if given_tokenizer:
        tokenizer = given_tokenizer
    elif tokenizer and big_vocab and Tokenizer.open(tokenizer).vocab_size > big_vocab:
        whole, tokenizer = tokenizer, os.fspath(folder / "big_tokenizer" / "tokenizer.model")

        def count() -> Any:
            held_out = {k: v for k, v in given.items() if k == "held_out_fraction"}
            place = os.fspath(folder / "whole_counts")
            source = {"dataset": None, "text": corpus, "tokenizer": whole}
            return run("", count_tokens, workdir=place, **source, **held_out, **reading)

        size = {"vocab_size": big_vocab, "coverage": None, "embedding_share": None}
        steps += [
            Step("count-tokens, tokenizer as given", count),
            Step(
                f"compress-tokenizer to {big_vocab:,} pieces",
                lambda: cut("whole_counts", whole, "big_tokenizer", **size),
            ),
        ]
    vocab_size = None if tokenizer else given.get("vocab_size")
    big = {"workdir": rows.big, "tokenizer": tokenizer, "vocab_size": vocab_size}

    def prepare() -> None:
        compact = {"tokenizer": f"{folder / 'tokenizer'}/tokenizer.model", "vocab_size": None}
        run("", prepare_data, text=corpus, workdir=rows.compact, **compact)
        check(rows)

    steps += [
        Step(
            "prepare-data, big tokenizer",
            lambda: run("", prepare_data, text=corpus, **big),
        ),
        Step(
            "count-tokens",
            lambda: run(
                "",
                count_tokens,
                workdir=os.fspath(folder / "counts"),
                dataset=rows.big,
                text=None,
                tokenizer=None,
            ),
        ),
        Step(
            "compress-tokenizer",
            lambda: cut("counts", f"{rows.big}/tokenizer.model", "tokenizer"),
        ),
        Step("prepare-data, compact tokenizer", prepare),
    ]
    return steps, rows


def bytes_a_token(dataset: str) -> float:
    """Bytes of text a token of the training split."""
    train_split = TokenDataset.described(dataset).description["splits"]["train"]
    return train_split["bytes"] / train_split["tokens"]
