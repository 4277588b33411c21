"""A model that is asked: what it finds likely, and what it writes, kept as it answers."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pangu_tiny.benchmark.answers import Answer, Answers, Request
from pangu_tiny.benchmark.put import Put
from pangu_tiny.benchmark.questions import Choice
from pangu_tiny.benchmark.scorer import Shared, score
from pangu_tiny.checkpoints.read import Checkpoint
from pangu_tiny.errors import Diverged
from pangu_tiny.evaluation.continuation import Asked, Drawing
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
        asked = []
        for one in questions:
            if isinstance(one.question, Choice):
                shared = Shared.of([ids.tolist() for ids in one.ids])
                asked.append(Request(one.key, len(one.ids), shared.size, shared))
        self.likelihoods(label, asked)

    def write(self, label: str, questions: Sequence[Put]) -> None:
        """What the model writes, the likeliest token each time."""
        marks = 0 if self.opened.about["begin_id"] is None else 1
        for tokens in sorted({one.tokens for one in questions if one.tokens}):
            asked = [
                Request(one.key, 1, (len(one.ids[0]),), Asked("", one.ids[0].tolist(), marks))
                for one in questions
                if one.tokens == tokens
            ]
            self.written(label, asked, GREEDY, tokens, [])

    def likelihoods(
        self, label: str, asked: list[Request], likeliest: bool = False
    ) -> Mapping[str, Answer]:
        """Answers with the nats of every choice, and with `likeliest` after them 1 for each choice
        whose ids are the likeliest, else 0."""
        decoder, chunk = self._program.objective.decoder, self._program.hardware.loss_chunk

        def answer(batch: list[Request]) -> Sequence[Answer]:
            found = score(decoder, self._params, [one.given for one in batch], chunk)
            if not np.isfinite(found.nats_bk).all():
                raise Diverged(f"a text of {batch[0].key} has a loss that is NaN or infinite")
            if likeliest:
                return np.concatenate(found, axis=1).tolist()
            return found.nats_bk.tolist()

        return self._answers.collect(label, asked, self._batch_size, answer)

    def written(
        self, label: str, asked: list[Request], sampling: Sampling, tokens: int, stop: list[str]
    ) -> Mapping[str, Answer]:
        """Answers with what the model writes."""
        numbers = {one.key: number for number, one in enumerate(asked)}

        def answer(batch: list[Request]) -> Sequence[Answer]:
            drawing = Drawing(self.opened, self._program, self._params, sampling, 0, tokens, stop)
            prompts = [one.given for one in batch]
            *_, ended = drawing.draw(prompts, [numbers[one.key] for one in batch], _STRETCH)
            return [one.text for one in ended]

        return self._answers.collect(f"{label}, written", asked, self._batch_size, answer)
