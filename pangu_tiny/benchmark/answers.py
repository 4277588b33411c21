"""What a model answers, batch by batch, kept on disk so that an interrupted run goes on."""

import itertools
import json
import operator
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
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
        self.by_key = _read(file)
        if len(set(gather(digest_of(self.by_key)))) > 1:
            raise UserError(f"{file} is another one in each process, expected a folder they share")

    def collect(
        self,
        label: str,
        asked: Sequence[Request],
        batch_size: int,
        answer: Callable[[list[Request]], Sequence[Answer]],
    ) -> Mapping[str, Answer]:
        """Answers what is not answered yet; gives all that is answered. Batches are those of all
        questions, so that what was interrupted comes to the same numbers."""
        done = sum(one.key in self.by_key for one in asked)
        if done == len(asked):
            return self.by_key
        with Progress(label, len(asked), "question", done, shown=first()) as progress:
            for batch in _batches(asked, batch_size):
                if all(one.key in self.by_key for one in batch):
                    continue
                # The last is filled up, so that it needs no program of its own.
                filled = batch + batch[-1:] * (min(batch_size, len(asked)) - len(batch))
                for one, found in zip(batch, answer(filled), strict=False):
                    self.by_key[one.key] = found
                progress.update(len(batch))
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


def _batches(asked: Sequence[Request], batch_size: int) -> Iterator[list[Request]]:
    """Of as many choices each, and of about one size."""
    choices = operator.attrgetter("choices")
    ordered = sorted(asked, key=lambda one: (one.choices, one.size, one.key))
    for _, alike in itertools.groupby(ordered, choices):
        found = list(alike)
        yield from (found[at : at + batch_size] for at in range(0, len(found), batch_size))
