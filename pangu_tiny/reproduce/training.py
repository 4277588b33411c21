"""What a recipe binds for a training, and what that costs."""

from typing import Any

from pangu_tiny import config
from pangu_tiny.data.dataset import TokenDataset
from pangu_tiny.errors import Stopped, UserError
from pangu_tiny.rounds.stages import settings
from pangu_tiny.training.train import Trained, train


def training_of(scope: str) -> dict[str, Any]:
    """All settings of `train` for a rung, or for the teacher."""
    with config.within(scope):
        return settings(train, dataset="", workdir="")


def tokens_of(training: dict[str, Any], length: int) -> int:
    """Of a training with these settings, on rows of such a length."""
    return training["steps"] * training["global_batch"] * length


def flops_of(training: dict[str, Any], length: int) -> float:
    """Floating-point operations of it."""
    return training["model"].flops_per_token(length) * tokens_of(training, length)


def check_epochs(scope: str, dataset: str, most: float) -> None:
    """Refuses a training, or a first round, that would go through the rows too often."""
    training = training_of(scope)
    taken = training["steps"] * training["global_batch"]
    rows = TokenDataset.described(dataset).count("train")
    if taken > most * rows:
        raise UserError(
            f"{scope}: train.steps × train.global_batch is {taken:,} rows, {taken / rows:.1f} times"
            f" the {rows:,} of dataset {dataset}, expected at most reproduce.max_epochs, {most:g}: "
            f"take more text, or fewer steps"
        )


def check_ended(trained: Trained) -> None:
    """Stops the recipe where a signal stopped a stage."""
    if trained.stopped or trained.step < trained.steps:
        raise Stopped(f"stopped at step {trained.step} of {trained.steps}; run again to resume")
