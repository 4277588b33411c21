"""What follows a prompt, as its tokens come: the text, and where it ends."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from pangu_tiny.checkpoints.read import Checkpoint
from pangu_tiny.evaluation.decoding import continuations
from pangu_tiny.evaluation.sampling import Sampling
from pangu_tiny.program.build import Program

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # as which the first bytes of a character are decoded


class Asked(NamedTuple):
    """A prompt, its ids with the begin mark, and how many of them are that mark."""

    prompt: str
    ids: list[int]
    begin: int


class Continuation:
    """What follows a prompt, as far as it is known."""

    def __init__(self, asked: Asked, drawing: "Drawing"):
        self._asked, self._drawing = asked, drawing
        self._logs: list[float] = []
        # Text is told by how much longer the decoded ids became. They are decoded from a place on
        # that is followed by some text, since a space at the beginning is left out.
        self._all = asked.ids[asked.begin :]
        self._from, self._told = 0, len(self._all)
        self.text, self.finish = "", ""

    def add(self, token: int, log_probability: float) -> None:
        """Takes a token, unless it is finished; afterwards it may be."""
        if self.finish:
            return
        drawing = self._drawing
        if token in drawing.end_ids:
            self.finish = "end"
            return
        self._logs.append(log_probability)
        self._all.append(token)
        before = drawing.tokenizer.decode(self._all[self._from : self._told])
        longer = drawing.tokenizer.decode(self._all[self._from :])
        if not longer.endswith(_UNFINISHED):
            self.text += longer[len(before) :]
            if longer[len(before) :].strip():
                self._from = self._told
            self._told = len(self._all)
        ends = [place for stop in drawing.stop if (place := self.text.find(stop)) >= 0]
        if ends:
            self.text, self.finish = self.text[: min(ends)], "stop"
        elif len(self._logs) == drawing.tokens:
            self.finish = "length"

    @property
    def held_back(self) -> int:
        """Characters at the end of the text that may be the beginning of a stop string."""
        lengths = [
            length
            for stop in ([] if self.finish else self._drawing.stop)
            for length in range(1, len(stop))
            if self.text.endswith(stop[:length])
        ]
        return max(lengths, default=0)

    def told(self, log_probabilities: bool) -> dict[str, Any]:
        told = {
            "prompt": self._asked.prompt,
            "text": self.text,
            "tokens": len(self._logs),
            "finish": self.finish or "length",
        }
        return told | ({"log_probabilities": self._logs} if log_probabilities else {})


class Drawing:
    """All that prompts share; to be used with the mesh of the program in context.

    Args:
      params: of `by_layer`.
      tokens: that are drawn at most.
      stop: texts before which a continuation ends.
    """

    def __init__(
        self,
        opened: Checkpoint,
        program: Program,
        params: dict[str, Any],
        sampling: Sampling,
        seed: int,
        tokens: int,
        stop: list[str],
    ):
        self.tokenizer = opened.tokenizer()
        self.end_ids = {opened.about["end_id"], *opened.about.get("end_ids", [])}
        self.tokens, self.stop = tokens, stop
        self._decoder, self._params = program.objective.decoder, params
        self._settings: dict[str, Any] = {"sampling": sampling, "seed": seed}
        self._settings["vocab_size"] = min(self.tokenizer.vocab_size, opened.shape.vocab_size)

    def draw(
        self, asked: Sequence[Asked], numbers: Sequence[int], stretch: int
    ) -> Iterator[list[Continuation]]:
        """Continuations of some prompts, longer and longer until all are finished."""
        found = [Continuation(one, self) for one in asked]
        ids = [one.ids for one in asked]
        more = {**self._settings, "numbers": numbers, "stretch": stretch}
        for drawn in continuations(self._decoder, self._params, ids, self.tokens, **more):
            for tokens_b, logs_b in zip(*drawn, strict=True):
                for one, token, log in zip(found, tokens_b.tolist(), logs_b.tolist(), strict=False):
                    one.add(token, log)
            yield found
            if all(one.finish for one in found):
                return
        yield found
