"""What a model answers, batch by batch, kept on disk so that an interrupted run goes on."""

import itertools
import json
import operator
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from etils import epath

from pangu_tiny.progress import Progress
from pangu_tiny.topology.processes import alone, anywhere, first, from_first
from pangu_tiny.workdir import read_json, write_atomically

Answer = list[float] | str
"""Nats of every choice, or what was written."""


class Asked(NamedTuple):
    """A question, ready for the model.

    Attributes:
      key: task, set and place.
      choices: how many there are.
      size: what is compiled for it.
      given: what the model is given.
    """

    key: str
    choices: int
    size: tuple[int, ...]
    given: Any


class Answers:
    """Kept by key, in one file."""

    def __init__(self, file: epath.Path, save_seconds: float):
        self._file, self._every, self._saved = file, save_seconds, time.monotonic()
        there = from_first(file.exists)
        self.by_key: dict[str, Answer] = read_json(file) if there else {}

    def collect(
        self,
        label: str,
        asked: Sequence[Asked],
        batch_size: int,
        answer: Callable[[list[Asked]], Sequence[Answer]],
    ) -> None:
        """Answers what is not answered yet. Batches are those of all questions, so that what was
        interrupted comes to the same numbers."""
        done = sum(one.key in self.by_key for one in asked)
        with Progress(label, len(asked), "question", done, shown=first()) as progress:
            for batch in _batches(asked, batch_size):
                if all(one.key in self.by_key for one in batch):
                    continue
                for one, found in zip(batch, answer(batch), strict=True):
                    self.by_key[one.key] = found
                progress.update(len(batch))
                if anywhere(time.monotonic() - self._saved > self._every):
                    self.save()
        self.save()

    def save(self) -> None:
        with alone() as leads:
            if leads:
                write_atomically(self._file, json.dumps(self.by_key, ensure_ascii=False))
        self._saved = time.monotonic()


def _batches(asked: Sequence[Asked], batch_size: int) -> Iterator[list[Asked]]:
    """Of as many choices each, and of about one size."""
    choices = operator.attrgetter("choices")
    ordered = sorted(asked, key=lambda one: (one.choices, one.size, one.key))
    for _, alike in itertools.groupby(ordered, choices):
        found = list(alike)
        yield from (found[at : at + batch_size] for at in range(0, len(found), batch_size))
