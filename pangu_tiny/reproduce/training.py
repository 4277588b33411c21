"""What a recipe binds for a training, and what that costs."""

from typing import Any

from pangu_tiny import config
from pangu_tiny.data.dataset import TokenDataset
from pangu_tiny.errors import Stopped, UserError
from pangu_tiny.reproduce.rungs import RUNGS, SCOPES
from pangu_tiny.rounds.stages import settings
from pangu_tiny.training.train import Trained, train

_OF_A_TEACHER = ("train", "ModelShape", "Optimizer", "Hardware", "Watching")


def training_of(scope: str) -> dict[str, Any]:
    """All settings of `train` for a rung, or for the teacher."""
    with config.within(scope):
        return settings(train, dataset="", workdir="")


def check_scopes() -> None:
    """Refuses what may not differ on a rung, where all but shape and rate is shared, and what is
    not of the teacher's training."""
    for scope in SCOPES:
        for binding, origin in config.bound_with(scope).items():
            owner, plain = binding.partition(".")[0], f"expected {binding} without {scope}/"
            if scope == "teacher":
                if owner not in _OF_A_TEACHER:
                    raise UserError(f"{origin}: {owner} is shared by all models, {plain}")
            elif owner == "ModelShape" and RUNGS[scope].inherits:
                raise UserError(f"{origin}: all rungs that inherit have one shape, {plain}")
            elif owner not in ("ModelShape", "Hardware") and binding != "Optimizer.learning_rate":
                raise UserError(
                    f"{origin}: rungs may differ in ModelShape and Optimizer.learning_rate, {plain}"
                )


def tokens_of(training: dict[str, Any], length: int) -> int:
    """Of a training with these settings, on rows of such a length."""
    return training["steps"] * training["global_batch"] * length


def flops_of(training: dict[str, Any], length: int) -> float:
    """Floating-point operations of it."""
    return training["model"].flops_per_token(length) * tokens_of(training, length)


def check_rows(name: str, training: dict[str, Any], dataset: str, max_epochs: float) -> None:
    """Refuses rows that do not fit the model of a training, that hold nothing out, or that it, or a
    first round of it, would go through too often.

    Args:
      name: of the model, for messages.
    """
    rows = TokenDataset.described(dataset)
    if rows.vocab_size != training["model"].vocab_size:
        raise UserError(
            f"{name}: ModelShape.vocab_size is {training['model'].vocab_size:,}, the tokenizer of "
            f"dataset {dataset} has {rows.vocab_size:,} pieces: expected as many"
        )
    if not rows.count("held_out"):
        raise UserError(f"dataset {dataset} holds nothing out: prepare_data.held_out_fraction is 0")
    taken, count = training["steps"] * training["global_batch"], rows.count("train")
    if taken > max_epochs * count:
        raise UserError(
            f"{name}: train.steps × train.global_batch is {taken:,} rows, {taken / count:.1f} "
            f"times the {count:,} of dataset {dataset}, expected at most reproduce.max_epochs, "
            f"{max_epochs:g}: take more text, or fewer steps"
        )


def check_ended(trained: Trained) -> None:
    """Stops the recipe where a signal stopped a stage."""
    if trained.stopped or trained.step < trained.steps:
        raise Stopped(f"stopped at step {trained.step} of {trained.steps}; run again to resume")
