"""Text in the two tokenizers of a recipe."""

import os
from collections.abc import Callable, Mapping
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


class TextStages:
    """The stages of a text, each in a folder of its own.

    Attributes:
      corpus: the text; the file that Python's library is written to, where none is given.

    Args:
      text: None is the library of this Python installation.
    """

    def __init__(self, folder: epath.Path, text: Text | None):
        self._folder, self._library = folder, text is None
        self.corpus: Any = os.fspath(folder / "corpus.jsonl") if text is None else text

    def prepare(self, workdir: str, **tokenizer: Any) -> None:
        run("", prepare_data, text=self.corpus, workdir=self._path(workdir), **tokenizer)

    def library(self) -> list[Step]:
        """What has to be written first."""
        file = epath.Path(self.corpus) if self._library else None
        return [Step("the library of Python", lambda: write_python_library(file))] if file else []

    def big(
        self, vocab_size: int | None, tokenizer: str | None = None, trained: int | None = None
    ) -> list[Step]:
        """Rows in the big tokenizer, `big_data`, and `counts` of them.

        Args:
          vocab_size, tokenizer: see `prepare_text`.
          trained: pieces of one that is trained there; None are those of `prepare_data.vocab_size`.
        """
        own: dict[str, Any] = {"vocab_size": trained} if trained else {}
        if tokenizer is not None:
            own = {"tokenizer": tokenizer, "vocab_size": None}
        bound = settings(prepare_data, text=self.corpus, workdir="", **own)
        whole = None if tokenizer else bound["tokenizer"]
        if whole:
            own, vocab_size = {"vocab_size": None}, bound["vocab_size"] or vocab_size
        steps = self.library()
        if whole and vocab_size and Tokenizer.open(whole).vocab_size > vocab_size:
            held_out = {"held_out_fraction": bound["held_out_fraction"]}
            size = {"vocab_size": vocab_size, "coverage": None, "embedding_share": None}
            source = {"text": self.corpus, "tokenizer": whole, **held_out, **self._key()}
            steps += [
                Step("count-tokens, whole tokenizer", lambda: self._count("whole_counts", source)),
                Step(
                    f"compress-tokenizer, to {vocab_size:,} pieces",
                    lambda: self._cut("whole_counts", whole, "big_tokenizer", size),
                ),
            ]
            own = {"tokenizer": self._path("big_tokenizer", "tokenizer.model"), "vocab_size": None}
        counted = {"dataset": self._path("big_data")}
        return [
            *steps,
            Step("prepare-data, big tokenizer", lambda: self.prepare("big_data", **own)),
            Step("count-tokens", lambda: self._count("counts", counted)),
        ]

    def compact(self, tokenizer: str, data: str, **size: Any) -> list[Step]:
        """Rows in a tokenizer that is cut out of the big one; folders of both."""
        cut_from, file = self._path("big_data", "tokenizer.model"), f"{tokenizer}/tokenizer.model"
        own = {"tokenizer": self._path(file), "vocab_size": None}
        return [
            Step(
                f"compress-tokenizer, {tokenizer}",
                lambda: self._cut("counts", cut_from, tokenizer, size),
            ),
            Step(f"prepare-data, {tokenizer}", lambda: self.prepare(data, **own)),
        ]

    def _path(self, *names: str) -> str:
        return os.fspath(self._folder.joinpath(*names))

    def _key(self) -> dict[str, str]:
        return {"text_key": settings(prepare_data, text=self.corpus, workdir="")["text_key"]}

    def _count(self, workdir: str, source: Mapping[str, Any]) -> None:
        nothing = {"text": None, "tokenizer": None, "dataset": None}
        run("", count_tokens, workdir=self._path(workdir), **{**nothing, **source})

    def _cut(self, counts: str, tokenizer: str, workdir: str, size: Mapping[str, Any]) -> None:
        places = {"counts": self._path(counts), "workdir": self._path(workdir)}
        given = {"tokenizer": tokenizer, "text": self.corpus, **places, **size, **self._key()}
        run("", compress_tokenizer, **given)


def prepare_text(
    folder: epath.Path,
    text: Text | None,
    big_vocab: int | None,
    tokenizer: str | None,
    check: Callable[[Rows], None],
) -> tuple[list[Step], Rows]:
    """The stages of text in the big and in the compact tokenizer.

    Args:
      text: None is the library of this Python installation.
      big_vocab: of the models that are made here and take the big tokenizer; one that is bound and
        has more pieces is cut first, to `prepare_data.vocab_size`, or to as many.
      tokenizer: the big one, of a teacher that is given; None is the one that is bound for
        prepare-data, or is trained there.
      check: called with the rows as soon as they are there.
    """
    stages = TextStages(folder, text)
    rows = Rows(os.fspath(folder / "big_data"), os.fspath(folder / "data"))
    steps = stages.big(big_vocab, tokenizer) + stages.compact("tokenizer", "data")
    last = steps.pop()

    def checked() -> None:
        last.run()
        check(rows)

    return [*steps, last._replace(title="prepare-data, compact tokenizer", run=checked)], rows


def bytes_a_token(dataset: str) -> float:
    """Bytes of text a token of the training split."""
    train_split = TokenDataset.described(dataset).description["splits"]["train"]
    return train_split["bytes"] / train_split["tokens"]
