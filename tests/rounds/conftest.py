"""A dataset of two sources, a run over a round of it, and its scores, for all tests that read."""

import pytest
import tiny_runs

from pangu_tiny.rounds.score import score_batches

STEPS = 12


@pytest.fixture(scope="session")
def dataset(tmp_path_factory):
    return tiny_runs.prepare(tmp_path_factory.mktemp("dataset"))


@pytest.fixture(scope="session")
def trained(dataset, tmp_path_factory):
    """A first round of 12 steps of a schedule of 24."""
    workdir = tmp_path_factory.mktemp("trained") / "round_1"
    tiny_runs.run(dataset, workdir, steps=STEPS, schedule_steps=2 * STEPS)
    return str(workdir)


@pytest.fixture(scope="session")
def score(dataset, trained):
    """score-batches on the eight devices of this process."""

    def score(workdir, **changes):
        settings = {"checkpoint": trained, "dataset": dataset, "hardware": tiny_runs.EIGHT}
        return score_batches(**{**settings, "workdir": str(workdir), **changes})

    return score


@pytest.fixture(scope="session")
def scored(score, tmp_path_factory):
    """The folder of its scores, a loss a batch."""
    workdir = tmp_path_factory.mktemp("scored") / "scores"
    score(workdir)
    return workdir
