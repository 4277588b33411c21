"""How the models of a table are made: what its rows share first, then one row with one seed."""

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from pangu_tiny import config
from pangu_tiny.data.prepare_data import prepare_data
from pangu_tiny.errors import UserError
from pangu_tiny.evaluation.evaluate import evaluate
from pangu_tiny.inherit.cut_list import check_fits
from pangu_tiny.inherit.importance import Importance, layer_scores
from pangu_tiny.inherit.inherit import inherit
from pangu_tiny.inherit.layers import LayerChoice
from pangu_tiny.inherit.rank_teacher import rank_teacher
from pangu_tiny.reproduce.agenda import Step
from pangu_tiny.reproduce.rows import TextStages, bytes_a_token
from pangu_tiny.reproduce.tables import TABLES
from pangu_tiny.reproduce.teacher import Teacher, find_teacher
from pangu_tiny.reproduce.training import check_ended, check_rows, flops_of, tokens_of, training_of
from pangu_tiny.rounds.forgetting import by_part, seen_losses
from pangu_tiny.rounds.score_batches import score_batches
from pangu_tiny.rounds.select_batches import select_batches
from pangu_tiny.rounds.stages import run, settings
from pangu_tiny.rounds.train_rounds import later_steps, train_rounds
from pangu_tiny.text.sources import Text
from pangu_tiny.training.train import train
from pangu_tiny.vocabulary.compress_tokenizer import compress_tokenizer

_STAGES: tuple[Callable[..., Any], ...] = (train, train_rounds, select_batches, score_batches)
_STAGES += (rank_teacher, inherit, compress_tokenizer)
_SEEDS = ("train.seed", "select_batches.seed", "rank_teacher.seed")


class Found(NamedTuple):
    """What was found of a model.

    Attributes:
      bits_per_byte: held out, at the end of its training.
      others: what else its table tells, by what stands above the column.
    """

    bits_per_byte: float
    others: dict[str, list[float]]


def within_row(
    table: str, row: str, given: Mapping[str, Any] | None = None
) -> AbstractContextManager[None]:
    """Inside, what the rows of a table differ in has this one's value: the overlay's, bound with
    the row's name, or else its file's. What is given wins over both."""
    own = config.bindings_of(_STAGES, f"paper/{table}/{row}.gin")
    scoped, varies = config.bound_with(row), TABLES[table].varies
    bound = {key: own[key] for key in varies if key in own and key not in scoped}
    return config.within(row, {**bound, **(given or {})})


class Plan:
    """Rows are trained from random parameters, on one text in one tokenizer.

    Attributes:
      trainings: what is bound for `train`, by row.
      length: of the rows of the dataset.
      notes: what is found of what the rows share, in sentences.

    Args:
      folder: of the table.
      name: of the table.
      rows: those that are made.
      text: of all of them; None is the library of this Python installation.
      max_epochs: see `reproduce`.
    """

    def __init__(
        self,
        folder: epath.Path,
        name: str,
        rows: Sequence[str],
        text: Text | None,
        max_epochs: float,
    ):
        self._folder, self._name, self._epochs = folder, name, max_epochs
        self._stages = TextStages(folder, text)
        self.length = settings(prepare_data, text="", workdir="")["sequence_length"]
        self.trainings = {row: self._settings(row) for row in rows}
        self.notes: list[str] = []

    def steps(self) -> list[Step]:
        """What comes before the models."""
        return [*self._stages.library(), Step("prepare-data", self._prepare)]

    def model(self, row: str, seed: int) -> Found:
        """Trains and evaluates one; run again, only what is missing of it."""
        with self._within(row, dict.fromkeys(_SEEDS, seed)):
            return self._model(row, f"{row}-{seed}")

    def tokens(self, row: str) -> int:
        """That a model of the row is trained on."""
        return tokens_of(self.trainings[row], self.length)

    def flops(self, row: str) -> float:
        """Floating-point operations of it."""
        return self.trainings[row]["model"].flops_per_token(self.length) * self.tokens(row)

    def _model(self, row: str, name: str) -> Found:
        """The same with what is bound for it; `name` is that of its folder."""
        return Found(self._trained(row, name), {})

    def _within(
        self, row: str, given: Mapping[str, Any] | None = None
    ) -> AbstractContextManager[None]:
        return within_row(self._name, row, given)

    def _settings(self, row: str) -> dict[str, Any]:
        with self._within(row):
            return settings(train, dataset="", workdir="")

    def _path(self, *names: str) -> str:
        return os.fspath(self._folder.joinpath(*names))

    def _dataset(self, row: str) -> str:
        """The rows of text that its models are trained on."""
        return self._path("data")

    def _prepare(self) -> None:
        self._stages.prepare("data")
        self._check_rows()

    def _check_rows(self) -> None:
        for row, training in self.trainings.items():
            check_rows(f"row {row}", training, self._dataset(row), self._epochs)

    def _train_shared(self, name: str) -> None:
        """Trains what rows go on from, by what is bound now."""
        dataset = self._path("data")
        check_rows(name, settings(train, dataset="", workdir=""), dataset, self._epochs)
        place = self._path(name)
        check_ended(run("", train, dataset=dataset, workdir=place, round_index=None))

    def _trained(self, row: str, name: str, **start: str) -> float:
        place = self._path("models", name)
        trained = run("", train, dataset=self._dataset(row), workdir=place, **start)
        check_ended(trained)
        return self._evaluated(row, trained.checkpoint, self._path("models", name, "evaluation"))

    def _evaluated(self, row: str, checkpoint: str, place: str) -> float:
        dataset = self._dataset(row)
        result = run("", evaluate, checkpoint=checkpoint, dataset=dataset, workdir=place)
        return result["bits_per_byte"]


class Rounds(Plan):
    """Rows are trained in rounds; what they have forgotten of the first is told by part of it."""

    def tokens(self, row: str) -> int:
        return super().tokens(row) * sum(self._rounds(row)) // self.trainings[row]["steps"]

    def _rounds(self, row: str) -> list[int]:
        """Steps of each round."""
        with self._within(row):
            rounds = settings(train_rounds, dataset="", workdir="")["rounds"]
            first = self.trainings[row]
            later = later_steps(first)
        return [first["steps"], *[later] * (rounds - 1)]

    def _model(self, row: str, name: str) -> Found:
        dataset, first = self._dataset(row), self._path("models", name, "round_1")
        place = self._path("models", name)
        trained = run("", train_rounds, dataset=dataset, workdir=place)
        check_ended(trained)
        bits = self._evaluated(row, trained.checkpoint, f"{place}/evaluation")
        scores = run(
            "",
            score_batches,
            checkpoint=trained.checkpoint,
            dataset=dataset,
            workdir=f"{place}/forgotten",
            round_of=first,
            unit="batch",
        )
        parts = by_part(scores, seen_losses(epath.Path(first), scores.round.batches))
        told = {f"round 1 by part, {name}": means.tolist() for name, means in parts.items()}
        return Found(bits, {"steps": list(map(float, self._rounds(row))), **told})


class Inheritance(Plan):
    """Rows are cut out of a teacher, which what is bound with the scope `teacher` trains first, and
    are trained on. All that choose alike have the same layers of it."""

    def __init__(self, *args: Any):
        super().__init__(*args)
        if not config.bound_with("teacher"):
            raise UserError(
                "there is no teacher, expected teacher/ModelShape.*: see paper/laptop.gin"
            )
        if origin := config.origin_of("train.checkpoint"):
            raise UserError(f"{origin}: rows start from the teacher, expected no train.checkpoint")
        for row, training in self.trainings.items():
            with self._within(row):  # for its complaints, before anything is trained
                layers = self._teacher(row).shape.depth
                self._choice().choose(layers, training["model"].depth, np.zeros(layers))

    def steps(self) -> list[Step]:
        row = next(iter(self.trainings))
        training = training_of("teacher")
        return [
            *super().steps(),
            Step("train the teacher", self._teach, flops_of(training, self.length)),
            Step("evaluate the teacher", lambda: self._evaluate_teacher(row)),
            Step("rank the teacher's layers", lambda: self._rank_layers(row)),
        ]

    def _teacher(self, row: str) -> Teacher:
        return find_teacher(self._folder, None, self.trainings[row]["model"])

    def _teach(self) -> None:
        with config.within("teacher"):
            self._train_shared("teacher")

    def _evaluate_teacher(self, row: str) -> None:
        place, shape = self._path("teacher", "evaluation"), self._teacher(row).shape
        bits = self._evaluated(row, self._path("teacher"), place)
        tokens = tokens_of(training_of("teacher"), self.length)
        self.notes = [
            f"One teacher: {shape.parameters / 1e6:,.1f}M parameters, {tokens / 1e6:,.2f}M tokens,"
            f" {bits:.3f} bits per byte."
        ]

    def _rank_layers(self, row: str) -> None:
        self._ranked("layers", method="l1", model=self._teacher(row).shape, choice=LayerChoice())

    def _ranked(self, *names: str, choice: LayerChoice, **given: Any) -> str:
        places = {"teacher": self._path("teacher"), "dataset": self._path("data")}
        place = self._path(*names)
        run("", rank_teacher, workdir=place, layer_choice=choice, **places, **given)
        return place

    def _choice(self) -> LayerChoice:
        return settings(inherit, teacher="", workdir="")["layer_choice"]

    def _layers(self, row: str) -> list[int]:
        choice = self._choice()
        scores = layer_scores(Importance.open(self._path("layers")).arrays, choice)
        depth = self.trainings[row]["model"].depth
        return choice.choose(self._teacher(row).shape.depth, depth, scores)

    def _model(self, row: str, name: str) -> Found:
        if config.is_bound("train.checkpoint"):  # to None: from random parameters
            return Found(self._trained(row, name), {})
        layers = self._layers(row)
        ranking = settings(rank_teacher, teacher="", workdir="")
        choice = LayerChoice(rule="listed", layers=layers)
        of = f"{ranking['method']}-{'_'.join(map(str, layers))}-{ranking['seed']}"
        importance = self._ranked("importance", of, choice=choice, output_grams=True)
        cut, teacher = self._path("cuts", name), self._path("teacher")
        read = {"importance": importance, "layer_choice": choice}
        run("", inherit, teacher=teacher, workdir=cut, **read)
        after = self._evaluated(row, cut, f"{cut}/evaluation")
        kept = {"layers": list(map(float, layers)), "after the cut": [after]}
        return Found(self._trained(row, name, checkpoint=cut), kept)


class GroupedQueries(Plan):
    """Rows are a finished model, trained by what is bound for no row, whose key-value heads become
    the means of neighbours, trained a little further."""

    def __init__(self, *args: Any):
        super().__init__(*args)
        tokens = tokens_of(training_of(""), self.length)
        self.notes = [
            f"One finished model, of {tokens / 1e6:,.2f}M tokens; seeds are of what comes after it."
        ]
        for training in self.trainings.values():
            check_fits(training_of("")["model"], training["model"], "merge")

    def steps(self) -> list[Step]:
        finished = flops_of(training_of(""), self.length)
        return [
            *super().steps(),
            Step("train the finished model", lambda: self._train_shared("finished"), finished),
        ]

    def _model(self, row: str, name: str) -> Found:
        cut = self._path("cuts", name)
        run("", inherit, teacher=self._path("finished"), workdir=cut, kv="merge")
        after = self._evaluated(row, cut, f"{cut}/evaluation")
        return Found(self._trained(row, name, checkpoint=cut), {"after the conversion": [after]})


class TokenizerSizes(Plan):
    """Rows are trained on one text, each in a tokenizer of its own that is cut out of the largest
    row's, be that made or not."""

    def __init__(self, *args: Any):
        super().__init__(*args)
        shapes = [self._settings(row)["model"] for row in TABLES[self._name].rows]
        self._largest = max(shape.vocab_size for shape in shapes)

    def steps(self) -> list[Step]:
        steps = self._stages.big(self._largest, trained=self._largest)
        for row in self.trainings:
            if self._pieces(row) < self._largest:
                size = {"vocab_size": self._pieces(row), "coverage": None, "embedding_share": None}
                steps += self._stages.compact(f"tokenizer_{row}", f"data_{row}", **size)
        return [*steps, Step("check rows", self._check_rows)]

    def _pieces(self, row: str) -> int:
        return self.trainings[row]["model"].vocab_size

    def _dataset(self, row: str) -> str:
        whole = self._pieces(row) == self._largest
        return self._path("big_data" if whole else f"data_{row}")

    def _model(self, row: str, name: str) -> Found:
        bits, shape = self._trained(row, name), self.trainings[row]["model"]
        outside = shape.vocab_size * shape.width * (1 if shape.tied else 2)
        shares = [100 * outside / shape.parameters]
        length = [bytes_a_token(self._dataset(row))]
        return Found(bits, {"% in embedding and head": shares, "bytes a token": length})


PLANS: dict[str, type[Plan]] = {
    "train": Plan,
    "rounds": Rounds,
    "inherit": Inheritance,
    "merge": GroupedQueries,
    "cut": TokenizerSizes,
}
"""By `Table.plan`."""
