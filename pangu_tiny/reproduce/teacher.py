"""The big model of a recipe, and what is cut out of it."""

import os
from typing import Any, NamedTuple

from etils import epath

from pangu_tiny import config
from pangu_tiny.checkpoints.read import Checkpoint, open_checkpoint
from pangu_tiny.errors import UserError
from pangu_tiny.evaluation.evaluate import evaluate
from pangu_tiny.inherit.cut_list import check_fits
from pangu_tiny.inherit.inherit import check_tie, inherit
from pangu_tiny.inherit.rank_teacher import check_method, rank_teacher
from pangu_tiny.model.shape import ModelShape
from pangu_tiny.reproduce.agenda import Step
from pangu_tiny.reproduce.rows import Rows
from pangu_tiny.reproduce.training import check_ended, flops_of, tokens_of, training_of
from pangu_tiny.rounds.stages import run, settings
from pangu_tiny.training.train import train
from pangu_tiny.workdir import write_atomically


class Teacher(NamedTuple):
    """The big model that is inherited from.

    Attributes:
      checkpoint: its own, or the workdir that it is trained in.
      opened: where it is not trained here.
      shape: its sizes.
    """

    checkpoint: str
    opened: Checkpoint | None
    shape: ModelShape


def find_teacher(folder: epath.Path, checkpoint: str | None, student: ModelShape) -> Teacher:
    """The teacher of a recipe, which the student must be able to inherit from."""
    if checkpoint is not None:
        opened = open_checkpoint(checkpoint)
        teacher = Teacher(checkpoint, opened, opened.shape)
    elif config.bound_with("teacher"):
        shape = training_of("teacher")["model"]
        teacher = Teacher(os.fspath(folder / "teacher"), None, shape)
    else:
        raise UserError(
            "there is no teacher to inherit from, expected reproduce.teacher, a checkpoint, or "
            "teacher/ModelShape.* and what else is to be trained: see recipes/laptop.gin"
        )
    ranking = settings(rank_teacher, teacher="", workdir="", dataset="")
    cutting = settings(inherit, teacher="", workdir="", importance="", tokenizer="")
    check_method(ranking["method"], student)
    check_fits(teacher.shape, student, cutting["kv"])
    check_tie(teacher.shape, student, cutting["tie"])
    if ranking["kv"] != cutting["kv"]:
        raise UserError(
            f"rank_teacher.kv is {ranking['kv']!r}, inherit.kv {cutting['kv']!r}: expected the same"
        )
    return teacher


def tokenizer_of(teacher: Teacher, folder: epath.Path) -> tuple[list[Step], str | None]:
    """The file of the tokenizer of a teacher that is given, and the step that writes it."""
    opened, file = teacher.opened, folder / "teacher.model"
    if not opened:
        return [], None
    if config.is_bound("prepare_data.tokenizer"):
        raise UserError(
            "prepare_data.tokenizer and reproduce.teacher are bound, expected one of them: a "
            "teacher's tokenizer is taken from its checkpoint"
        )
    own = opened.sentencepiece().model_bytes
    return [Step("the teacher's tokenizer", lambda: write_atomically(file, own))], os.fspath(file)


def cut_teacher(
    folder: epath.Path, teacher: Teacher, rows: Rows, length: int, figures: dict[str, Any]
) -> tuple[list[Step], str]:
    """The stages from a teacher to the checkpoint that the models start from.

    Args:
      length: of the rows.
      figures: takes what evaluate finds of `teacher` and `cut`.

    Returns:
      The stages, and the workdir of inherit.
    """
    places = {name: os.fspath(folder / name) for name in ("importance", "cut", "tokenizer")}
    source = {"teacher": teacher.checkpoint}

    def evaluated(name: str, checkpoint: str, dataset: str | None) -> None:
        place = os.fspath(folder / f"{name}_evaluation")
        figures[name] = run("", evaluate, checkpoint=checkpoint, dataset=dataset, workdir=place)

    def trained() -> None:
        with config.within("teacher"):
            ended = run("", train, dataset=rows.big, workdir=teacher.checkpoint, round_index=None)
            check_ended(ended)

    def ranked() -> None:
        corrects = settings(inherit, teacher="", workdir="")["correct_outputs"]
        grams = {"output_grams": True} if corrects else {}
        place = places["importance"]
        run("", rank_teacher, dataset=rows.big, workdir=place, **source, **grams)

    def inherited() -> None:
        read = {name: places[name] for name in ("importance", "tokenizer")}
        run("", inherit, workdir=places["cut"], **source, **read)
        evaluated("cut", places["cut"], rows.compact)

    steps = [
        Step("evaluate the teacher", lambda: evaluated("teacher", teacher.checkpoint, rows.big)),
        Step("rank-teacher", ranked),
        Step("inherit", inherited),
    ]
    if not teacher.opened:
        steps.insert(
            0, Step("train the teacher", trained, flops_of(training_of("teacher"), length))
        )
    return steps, places["cut"]


def told_of(teacher: Teacher, length: int, figures: dict[str, Any]) -> dict[str, Any]:
    """What a report tells of a teacher, with what `cut_teacher` found."""
    return {
        "parameters": teacher.shape.parameters,
        "tokens": None if teacher.opened else tokens_of(training_of("teacher"), length),
        "bits_per_byte": figures["teacher"]["bits_per_byte"],
        "bits_per_byte_after_the_cut": figures["cut"]["bits_per_byte"],
    }
