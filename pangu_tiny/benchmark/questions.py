"""What a benchmark asks, as texts, and how a task is declared."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from etils import epath

from pangu_tiny.errors import UserError

NONE = -1
"""The place of the right answer where none of the choices is it."""

LM_EVAL = "lm-eval:"
"""Before the name of a task of lm-evaluation-harness."""


class Choice(NamedTuple):
    """A question that is answered by the likeliest of several texts.

    Attributes:
      head: what stands before everything.
      shots: questions with their answers, each as it stands in the text.
      before: what stands between the shots and the question, or before it where there are none.
      bodies: of each choice, what follows.
      gold: the place of the right one; or NONE.
    """

    head: str
    shots: tuple[str, ...]
    before: str
    bodies: tuple[str, ...]
    gold: int

    def texts(self, shots: int) -> list[str]:
        """The whole texts, with the first so many shots."""
        beginning = self.head + "".join(self.shots[:shots]) + self.before
        return [beginning + body for body in self.bodies]


class Open(NamedTuple):
    """A question that is answered by what the model writes."""

    prompt: str
    reference: str


Question = Choice | Open


class Row(NamedTuple):
    """A row of a benchmark's file: its fields, and the file and line, for messages."""

    fields: Mapping[str, str]
    where: str


Reader = Callable[[epath.Path], Iterator[Row]]


@dataclasses.dataclass(frozen=True)
class Part:
    """How questions are made of files. Braces are fields of a row, or of its set.

    Attributes:
      file: below the folder of all benchmarks; {set} is the name of a set.
      read: its rows.
      prompt: what all choices share; after it the model writes where there are none.
      choices: what follows the prompt, one each; none where the model writes.
      gold: the field of the right answer, or of the reference text.
      labels: the values of that field, in the order of the choices.
      sets: by name, further fields of every row; all are of equal weight.
      shots_file: rows with answers, the first `shots` of which stand before every question.
      head: what stands before them.
      after_shot, between: what follows each, and what stands between two.
      before: what stands before the question, with shots or without.
      several: a label may name several choices; such a question has no right one.
      tokens: that are written at most.
      grade: of what is written and the reference, from 0 to 1.
      most: rows that are read; None is all.
    """

    file: str
    read: Reader
    prompt: str
    gold: str
    choices: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    sets: Mapping[str, Mapping[str, str]] = dataclasses.field(default_factory=lambda: {"": {}})
    shots_file: str = ""
    shots: int = 0
    head: str = ""
    after_shot: str = ""
    between: str = ""
    before: str = ""
    several: bool = False
    tokens: int = 0
    grade: Callable[[str, str], float] | None = None
    most: int | None = None

    def questions(self, folder: epath.Path, name: str) -> list[Question]:
        """Those of a set."""
        shots = [
            (self.between if number else "")
            + self._filled(self.prompt, row)
            + self.choices[self._place(row)]
            + self.after_shot
            for number, row in enumerate(self._rows(folder, self.shots_file, name, self.shots))
        ]
        questions = [
            self._question(row, tuple(shots))
            for row in self._rows(folder, self.file, name, self.most)
        ]
        if not questions:
            raise UserError(f"benchmark.folder: {folder / self.file.format(set=name)} is empty")
        return questions

    def _rows(self, folder: epath.Path, file: str, name: str, most: int | None) -> Iterator[Row]:
        if not file:
            return
        path = folder / file.format(set=name)
        if not path.exists():
            raise UserError(
                f"benchmark.folder: {path} is missing, {file.format(set=name)} of"
                " OpenCompass's data folder"
            )
        for number, row in enumerate(self.read(path)):
            if number == most:
                return
            yield row._replace(fields={**row.fields, **self.sets[name]})

    def _question(self, row: Row, shots: tuple[str, ...]) -> Question:
        prompt = self._filled(self.prompt, row)
        if not self.choices:
            return Open(prompt, self._filled(f"{{{self.gold}}}", row))
        bodies = tuple(prompt + self._filled(choice, row) for choice in self.choices)
        return Choice(self._filled(self.head, row), shots, self.before, bodies, self._place(row))

    def _place(self, row: Row) -> int:
        label = self._filled(f"{{{self.gold}}}", row)
        if label in self.labels:
            return self.labels.index(label)
        if self.several and len(label) > 1 and set(label) <= set(self.labels):
            return NONE
        raise UserError(
            f"benchmark.folder: {row.where}: {self.gold} is {label!r}, expected one of"
            f" {', '.join(self.labels)}"
        )

    def _filled(self, template: str, row: Row) -> str:
        try:
            return template.format_map(row.fields)
        except KeyError as error:
            raise UserError(
                f"benchmark.folder: {row.where} has no {error.args[0]!r}, which is read of it"
            ) from error


@dataclasses.dataclass(frozen=True)
class Task:
    """A column of a table.

    Attributes:
      title: as in the paper.
      parts: of all sets of which the mean is taken.
      split: of the benchmark.
      published: how many questions that split has; None where no count was found.
      source: where its prompts are, in OpenCompass's configs/datasets (Apache-2.0).
      metric: what is told, in hundredths.
    """

    title: str
    parts: Sequence[Part]
    split: str
    published: int | None
    source: str
    metric: str = "accuracy"
