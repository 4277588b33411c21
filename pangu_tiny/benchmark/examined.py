"""A model that is asked: what it finds likely, and what it writes, kept as it answers."""

import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pangu_tiny.benchmark.answers import Answer, Answers, Batch, Request
from pangu_tiny.benchmark.put import Put
from pangu_tiny.benchmark.questions import Choice
from pangu_tiny.benchmark.scorer import Shared, rows_of, score
from pangu_tiny.checkpoints.read import Checkpoint
from pangu_tiny.errors import Diverged
from pangu_tiny.evaluation.continuation import Asked, Drawing
from pangu_tiny.evaluation.decoding import shards
from pangu_tiny.evaluation.sampling import GREEDY, Sampling
from pangu_tiny.model.cached import by_layer
from pangu_tiny.program.build import Program

_STRETCH = 16  # tokens of a batch that are written between two looks at them


class Examined:
    """A model, and what it has answered; with the mesh of the program in context."""

    def __init__(self, opened: Checkpoint, program: Program, answers: Answers, batch_size: int):
        self.opened, self._program = opened, program
        self.longest = opened.about["sequence_length"]
        self._answers, self._batch_size = answers, batch_size

    @functools.cached_property
    def _params(self) -> dict[str, Any]:
        """Read when there is something to answer."""
        stored = self._program.objective.decoder.dtype
        return by_layer(self.opened.params(self._program.param_shardings, stored))

    def choose(self, label: str, questions: Sequence[Put]) -> None:
        """Nats of every choice."""
        asked = [
            Request(one.key, Shared.of([ids.tolist() for ids in one.ids]))
            for one in questions
            if isinstance(one.question, Choice)
        ]
        self.likelihoods(label, asked)

    def write(self, label: str, questions: Sequence[Put]) -> None:
        """What the model writes, the likeliest token each time."""
        marks = 0 if self.opened.about["begin_id"] is None else 1
        for tokens in sorted({one.tokens for one in questions if one.tokens}):
            asked = [
                Request(one.key, Asked("", one.ids[0].tolist(), marks))
                for one in questions
                if one.tokens == tokens
            ]
            self.written(label, asked, GREEDY, tokens, [])

    def likelihoods(
        self, label: str, asked: Sequence[Request], likeliest: bool = False
    ) -> Mapping[str, Answer]:
        """Answers with the nats of every choice, and with `likeliest` after them 1 for each choice
        whose ids are the likeliest, else 0."""
        decoder, chunk = self._program.objective.decoder, self._program.hardware.loss_chunk

        def answer(batch: Batch) -> Sequence[Answer]:
            rows = [[one.given for one in row] for row in batch]
            scores = score(decoder, self._params, rows, chunk)
            for one, found in zip(itertools.chain(*batch), scores, strict=True):
                if not np.isfinite(found.nats_k).all():
                    raise Diverged(f"a text of {one.key} has a loss that is NaN or infinite")
            told = [np.concatenate(found) if likeliest else found.nats_k for found in scores]
            return [one.tolist() for one in told]

        batches: list[Batch] = []
        for alike in rows_of([one.given.positions for one in asked]):
            size = min(max(self._batch_size, shards()), len(alike))
            # The last is filled up, so that it needs no program of its own.
            alike += [[]] * (-len(alike) % size)
            rows = [[asked[place] for place in row] for row in alike]
            batches += [rows[at : at + size] for at in range(0, len(rows), size)]
        return self._answers.collect(label, batches, answer)

    def written(
        self,
        label: str,
        asked: Sequence[Request],
        sampling: Sampling,
        tokens: int,
        stop: list[str],
    ) -> Mapping[str, Answer]:
        """Answers with what the model writes."""
        numbers = {one.key: number for number, one in enumerate(asked)}
        size = min(max(self._batch_size, shards()), len(asked))

        def answer(batch: Batch) -> Sequence[Answer]:
            drawing = Drawing(self.opened, self._program, self._params, sampling, 0, tokens, stop)
            filled = [one for (one,) in batch]
            filled += filled[-1:] * (size - len(filled))
            drawn_as = [numbers[one.key] for one in filled]
            *_, ended = drawing.draw([one.given for one in filled], drawn_as, _STRETCH)
            return [one.text for one in ended[: len(batch)]]

        rows = [[one] for one in sorted(asked, key=lambda one: (len(one.given.ids), one.key))]
        batches = [rows[at : at + size] for at in range(0, len(rows), max(size, 1))]
        return self._answers.collect(f"{label}, written", batches, answer)
