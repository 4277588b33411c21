"""Questions as they are put to a model: in ids, none longer than it allows."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from etils import epath

from pangu_tiny.benchmark.paper_tasks import TASKS
from pangu_tiny.benchmark.questions import Choice, Open, Part, Question
from pangu_tiny.checkpoints.read import Checkpoint
from pangu_tiny.errors import UserError, failing_as


class Put(NamedTuple):
    """A question as it is put.

    Attributes:
      key: task, set and place.
      ids: int32, of each choice, or of the prompt alone.
      tokens: that may be written.
      shots_left_out, cut: whether it had to be made shorter, and how.
    """

    key: str
    part: Part
    question: Question
    ids: list[np.ndarray]
    tokens: int
    shots_left_out: bool
    cut: bool


def put(
    opened: Checkpoint, folder: epath.Path, names: Sequence[str], most: int | None
) -> Iterator[Put]:
    """The questions of some tasks, of every set the first `most`."""
    model = _Model(opened)
    for name in names:
        for part in TASKS[name].parts:
            for of_set in part.sets:
                for place, question in enumerate(part.questions(folder, of_set)[:most]):
                    key = f"{name}/{of_set}/{place}"
                    if isinstance(question, Choice):
                        yield model.choice(key, part, question)
                    else:
                        yield model.open(key, part, question)


def encodable(what: str, text: str) -> str:
    """A text that is one; there are strings that cannot be written as UTF-8."""
    with failing_as(f"benchmark.folder: {what} is not text", UnicodeEncodeError):
        text.encode()
    return text


def known(opened: Checkpoint, what: str, ids: list[int]) -> list[int]:
    """Ids that the model has."""
    if (largest := max(ids, default=0)) >= opened.shape.vocab_size:
        raise UserError(
            f"checkpoint {opened.path} has {opened.shape.vocab_size:,} ids, but its tokenizer makes"
            f" id {largest:,} of {what}: it is another model's"
        )
    return ids


class _Model:
    """What of a model decides how it is asked."""

    def __init__(self, opened: Checkpoint):
        self._opened, self._tokenizer = opened, opened.tokenizer()
        self._longest, mark = opened.about["sequence_length"], opened.about["begin_id"]
        self._begin = [] if mark is None else [mark]
        if self._longest < 8:
            raise UserError(
                f"checkpoint {opened.path} was trained on sequences of {self._longest}, expected"
                " at least 8 to ask it something"
            )

    def choice(self, key: str, part: Part, question: Choice) -> Put:
        for shots in range(len(question.shots), -1, -1):
            ids = [self._ids(key, text) for text in question.texts(shots)]
            if max(map(len, ids)) <= self._longest:
                break
        fewer = shots < len(question.shots)
        return self._cut(key, part, question, ids, self._longest, 0)._replace(shots_left_out=fewer)

    def open(self, key: str, part: Part, question: Open) -> Put:
        """At most half of what the model allows is written; not stated in the paper: chosen so
        that a prompt has as much room, whatever the model allows."""
        tokens = min(part.tokens, self._longest // 2)
        ids = [self._ids(key, question.prompt)]
        return self._cut(key, part, question, ids, self._longest - tokens, tokens)

    def _ids(self, key: str, text: str) -> np.ndarray:
        ids = self._begin + self._tokenizer.encode(encodable(f"question {key}", text))
        return np.asarray(known(self._opened, f"question {key}", ids), np.int32)

    def _cut(
        self,
        key: str,
        part: Part,
        question: Question,
        ids: list[np.ndarray],
        room: int,
        tokens: int,
    ) -> Put:
        cut = max(map(len, ids)) > room
        shorter = [one if len(one) <= room else self._last(one, room) for one in ids]
        return Put(key, part, question, shorter, tokens, False, cut)

    def _last(self, ids: np.ndarray, room: int) -> np.ndarray:
        """As many of the last as there is room for, behind the begin mark."""
        marks = len(self._begin)
        return np.concatenate([ids[:marks], ids[len(ids) - room + marks :]])
