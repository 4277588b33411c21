"""Text in the two tokenizers of a recipe."""

import os
from collections.abc import Callable
from typing import Any, NamedTuple

from etils import epath

from pangu_tiny.data.dataset import TokenDataset
from pangu_tiny.data.prepare_data import prepare_data
from pangu_tiny.reproduce.agenda import Step
from pangu_tiny.reproduce.corpus import write_python_library
from pangu_tiny.rounds.stages import run, settings
from pangu_tiny.text.sources import Text
from pangu_tiny.tokenizer.model import Tokenizer
from pangu_tiny.vocabulary.compress_tokenizer import compress_tokenizer
from pangu_tiny.vocabulary.count_tokens import count_tokens


class Rows(NamedTuple):
    """Workdirs of prepare-data, of the same text.

    Attributes:
      big: in the ids of the big tokenizer; None where there is no text, but rows that are given.
      compact: in those of the compact one.
    """

    big: str | None
    compact: str


def prepare_text(
    folder: epath.Path,
    text: Text | None,
    big_vocab: int | None,
    tokenizer: str | None,
    check: Callable[[Rows], None],
) -> tuple[list[Step], Rows]:
    """The stages of text.

    Args:
      text: None is the library of this Python installation.
      big_vocab: of the models that are made here and take the big tokenizer; one that is bound and
        has more pieces is cut first, to `prepare_data.vocab_size`, or to as many.
      tokenizer: the big one, of a teacher that is given; None is the one that is bound for
        prepare-data, or is trained there.
      check: called with the rows as soon as they are there.
    """
    corpus: Any = os.fspath(folder / "corpus.jsonl") if text is None else text
    big, compact = os.fspath(folder / "big_data"), os.fspath(folder / "data")
    own = {} if tokenizer is None else {"tokenizer": tokenizer, "vocab_size": None}
    bound = settings(prepare_data, text=corpus, workdir=big, **own)
    key = {"text_key": bound["text_key"]}

    def count(workdir: str, **source: Any) -> None:
        nothing = {"text": None, "tokenizer": None, "dataset": None}
        run("", count_tokens, workdir=os.fspath(folder / workdir), **{**nothing, **source})

    def cut(counts: str, tokenizer: str, workdir: str, **size: Any) -> None:
        places = {"counts": os.fspath(folder / counts), "workdir": os.fspath(folder / workdir)}
        run("", compress_tokenizer, tokenizer=tokenizer, text=corpus, **places, **size, **key)

    def prepare(workdir: str, **tokenizer: Any) -> None:
        run("", prepare_data, text=corpus, workdir=workdir, **tokenizer)

    def prepare_compact() -> None:
        prepare(compact, tokenizer=f"{folder / 'tokenizer'}/tokenizer.model", vocab_size=None)
        check(Rows(big, compact))

    steps: list[Step] = []
    if text is None:
        library = epath.Path(corpus)
        steps.append(Step("the library of Python", lambda: write_python_library(library)))
    whole = None if tokenizer else bound["tokenizer"]
    if whole:
        own, big_vocab = {"vocab_size": None}, bound["vocab_size"] or big_vocab
    if whole and big_vocab and Tokenizer.open(whole).vocab_size > big_vocab:
        held_out = {"held_out_fraction": bound["held_out_fraction"]}
        size = {"vocab_size": big_vocab, "coverage": None, "embedding_share": None}
        source = {"text": corpus, "tokenizer": whole, **held_out, **key}
        steps += [
            Step("count-tokens, whole tokenizer", lambda: count("whole_counts", **source)),
            Step(
                f"compress-tokenizer, to {big_vocab:,} pieces",
                lambda: cut("whole_counts", whole, "big_tokenizer", **size),
            ),
        ]
        own = {"tokenizer": f"{folder / 'big_tokenizer'}/tokenizer.model", "vocab_size": None}
    steps += [
        Step("prepare-data, big tokenizer", lambda: prepare(big, **own)),
        Step("count-tokens", lambda: count("counts", dataset=big)),
        Step("compress-tokenizer", lambda: cut("counts", f"{big}/tokenizer.model", "tokenizer")),
        Step("prepare-data, compact tokenizer", prepare_compact),
    ]
    return steps, Rows(big, compact)


def bytes_a_token(dataset: str) -> float:
    """Bytes of text a token of the training split."""
    train_split = TokenDataset.described(dataset).description["splits"]["train"]
    return train_split["bytes"] / train_split["tokens"]
