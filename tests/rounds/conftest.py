"""A dataset of three sources, a run over a mixture of two of them, and its scores, for all tests
that read."""

import pytest
import tiny_runs

from pangu_tiny.data.prepare_data import prepare_data
from pangu_tiny.program.optimizer import SharedSchedule
from pangu_tiny.rounds.score_batches import score_batches

STEPS = 12
ORDER = {"seed": 3, "mixture": {"b": 1.0, "c": 2.0}}


@pytest.fixture(scope="session")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dataset")
    tiny_runs.prepare(folder)
    lines = (folder / "text.jsonl").read_text().splitlines(keepends=True)
    sources = {}
    for number, name in enumerate("abc"):
        (folder / f"{name}.jsonl").write_text("".join(lines[number::3]))
        sources[name] = str(folder / f"{name}.jsonl")
    prepare_data(
        sources,
        str(folder / "several"),
        tokenizer=str(folder / "data" / "tokenizer.model"),
        sequence_length=32,
        held_out_fraction=0.1,
        processes=1,
    )
    return str(folder / "several")


@pytest.fixture(scope="session")
def trained(dataset, tmp_path_factory):
    """A first round of 12 steps of a schedule of 24."""
    workdir = tmp_path_factory.mktemp("trained") / "round_1"
    schedule = SharedSchedule(steps=2 * STEPS)
    tiny_runs.run(dataset, workdir, steps=STEPS, shared_schedule=schedule, **ORDER)
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
