"""What a model answers, batch by batch, kept on disk so that an interrupted run goes on."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from etils import epath

from pangu_tiny.errors import UserError
from pangu_tiny.progress import Progress
from pangu_tiny.topology.processes import first, gather
from pangu_tiny.workdir import digest_of, read_json, write_atomically

Answer = list[float] | str
"""Nats of every choice, or what was written."""


class Request(NamedTuple):
    """A question, ready for the model.

    Attributes:
      key: task, set and place.
      given: what the model is given.
    """

    key: str
    given: Any


Batch = Sequence[Sequence[Request]]
"""What is answered at once: rows of questions."""


class Answers:
    """Kept by key, in one file."""

    def __init__(self, file: epath.Path, save_seconds: float):
        self._file, self._every, self._saved = file, save_seconds, time.monotonic()
        self.by_key = _read(file)
        if len(set(gather(digest_of(self.by_key)))) > 1:
            raise UserError(f"{file} is another one in each process, expected a folder they share")

    def collect(
        self,
        label: str,
        batches: Sequence[Batch],
        answer: Callable[[Batch], Sequence[Answer]],
    ) -> Mapping[str, Answer]:
        """Answers the batches in which something is not answered yet; gives all that is answered.
        They are to be the same each time, so that what was interrupted comes to the same numbers.

        Args:
          answer: of all questions of a batch, row by row.
        """
        asked = [[one.key for row in batch for one in row] for batch in batches]
        done = [all(key in self.by_key for key in keys) for keys in asked]
        counts = list(map(len, asked))
        if all(done):
            return self.by_key
        if len(set(gather(digest_of(asked)))) > 1:
            raise UserError(f"processes ask other questions of {label}, expected the same")
        before = sum(count for count, known in zip(counts, done, strict=True) if known)
        with Progress(label, sum(counts), "question", before, shown=first()) as progress:
            for keys, batch, known in zip(asked, batches, done, strict=True):
                if known:
                    continue
                self.by_key.update(zip(keys, answer(batch), strict=True))
                progress.update(len(keys))
                if first() and time.monotonic() - self._saved > self._every:
                    self.save()
        self.save()
        return self.by_key

    def save(self) -> None:
        """By the first process; nobody waits for it."""
        if first():
            write_atomically(self._file, json.dumps(self.by_key, ensure_ascii=False))
        self._saved = time.monotonic()


def _read(file: epath.Path) -> dict[str, Answer]:
    if not file.exists():
        return {}
    found = read_json(file)
    for key, answer in found.items():
        numbers = isinstance(answer, list) and all(isinstance(nats, float) for nats in answer)
        if not (numbers or isinstance(answer, str)):
            raise UserError(f"{file} is damaged: {key} is {answer!r:.40}; delete it to ask anew")
    return found
