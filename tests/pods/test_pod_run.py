"""A whole job as a pod runs it, on this machine: from a corpus of Parquet on gs:// to a model that
inherited, was trained in two rounds and evaluated, killed five times at random.

    ./tests/run.sh -m simulation
"""

import contextlib
import random
import shutil
import subprocess
import sys
import time

import fsspec
import numpy as np
import pytest
from etils import epath
from test_beam import write_corpus
from tiny_runs import assert_same_bits, start, start_together, state_of

from pangu_tiny.training.metrics import read_row_losses

pytestmark = pytest.mark.simulation

KILLS = 5
TEACHER = {"depth": 3, "width": 32, "heads": 4, "ffn_width": 48, "vocab_size": 320}
STUDENT = TEACHER | {"depth": 2, "width": 24, "heads": 2, "head_dim": 8, "vocab_size": 280}
TRAINING = {
    "train.dtype": "float32",
    "train.steps": 12,
    "train.save_every": 2,
    "train.evaluate_every": 6,
    "train.global_batch": 8,
    "Hardware.fsdp": 8,
    "Hardware.per_device_batch": 1,
    "Optimizer.learning_rate": 3e-3,
    "Watching.keep_every": 2,
}


def stages(there, mount):
    """Name, whether all processes run it, and bindings of each stage. Text and workdirs are on
    gs://; what stages read of earlier ones lies on the mount."""
    rows = {"sequence_length": 32, "held_out_fraction": 0.1, "runner": "DirectRunner"}
    rows |= {"text": f"{there}/corpus", "shard_bytes": 20_000}

    def shape(sizes):
        return {f"ModelShape.{name}": value for name, value in sizes.items()}

    def of(stage, **bindings):
        return {f"{stage}.{name}": value for name, value in bindings.items()}

    yield (
        "prepare-data",
        False,
        of("prepare_data", **rows, vocab_size=320, workdir=f"{there}/big_data"),
    )
    yield (
        "count-tokens",
        False,
        of("count_tokens", dataset=f"{mount}/big_data", workdir=f"{there}/counts"),
    )
    yield (
        "compress-tokenizer",
        False,
        of(
            "compress_tokenizer",
            counts=f"{mount}/counts",
            tokenizer=f"{mount}/big_data/tokenizer.model",
            vocab_size=280,
            workdir=f"{there}/compact",
        ),
    )
    yield (
        "prepare-data",
        False,
        of(
            "prepare_data",
            **rows,
            tokenizer=f"{mount}/compact/tokenizer.model",
            workdir=f"{there}/data",
        ),
    )
    yield (
        "train",
        True,
        TRAINING
        | shape(TEACHER)
        | of("train", dataset=f"{mount}/big_data", workdir=f"{there}/teacher"),
    )
    layers = {"LayerChoice.first": 0, "LayerChoice.last": 0}
    yield (
        "rank-teacher",
        True,
        layers
        | shape(STUDENT)
        | {"Hardware.fsdp": 8}
        | of(
            "rank_teacher",
            teacher=f"{there}/teacher",
            dataset=f"{mount}/big_data",
            workdir=f"{there}/importance",
            method="taylor",
            calibration_batches=4,
            batch_size=8,
        ),
    )
    yield (
        "inherit",
        False,
        layers
        | shape(STUDENT)
        | of(
            "inherit",
            teacher=f"{there}/teacher",
            importance=f"{there}/importance",
            tokenizer=f"{mount}/compact",
            workdir=f"{there}/student",
        ),
    )
    yield (
        "train-rounds",
        True,
        TRAINING
        | shape(STUDENT)
        | {
            "train.checkpoint": f"{there}/student",
            "score_batches.batch_size": 8,
            "train_rounds.dataset": f"{mount}/data",
            "train_rounds.workdir": f"{there}/model",
        },
    )
    yield (
        "evaluate",
        True,
        {"Hardware.fsdp": 8, "Hardware.per_device_batch": 1}
        | of(
            "evaluate",
            checkpoint=f"{there}/model/round_2",
            dataset=f"{mount}/data",
            workdir=f"{there}/evaluation",
        ),
    )


def refresh(there, mount):
    """What a mounted bucket shows: all that lies there."""
    shutil.rmtree(mount, ignore_errors=True)
    files, _ = fsspec.core.url_to_fs(there)
    files.get(f"{there}/", f"{mount}/", recursive=True)


class Job:
    """Runs the stages one after the other, as launch/gke.sh would: again, while they end with
    anything but 0.

    Args:
      kills: seconds of work after which a process is killed; those that are not yet due.
    """

    def __init__(self, there, folder, kills=()):
        self.there, self.mount, self.folder = there, folder / "mount", folder
        self.kills, self.worked, self.told = sorted(kills), 0.0, []
        folder.mkdir()
        write_corpus(epath.Path(f"{there}/corpus"))

    def run(self):
        for number, (stage, together, bindings) in enumerate(stages(self.there, self.mount)):
            flags = [f"--gin.{name}={value}" for name, value in bindings.items()]
            argv, logs = (
                [sys.executable, "-m", "pangu_tiny", stage, *flags],
                self.folder / str(number),
            )
            while True:
                logs.mkdir(exist_ok=True)
                began = time.monotonic()
                processes = (
                    start_together(argv, logs) if together else [start(argv, 8, logs / "log0")]
                )
                killed = self._wait(processes)
                self.worked += time.monotonic() - began
                codes = [process.wait() for process in processes]
                if killed is None:
                    assert set(codes) == {0}, (stage, codes, (logs / "log0").read_text()[-3000:])
                    break
                self.told.append((stage, killed, codes))
                print(self.told[-1], flush=True)
                shutil.rmtree(logs)
            refresh(self.there, self.mount)

    def _wait(self, processes):
        """Until the processes have ended, or the next kill is due: then which one is killed."""
        left = self.kills[0] - self.worked if self.kills else None
        with contextlib.suppress(subprocess.TimeoutExpired):
            processes[0].wait(timeout=left and max(left, 0.01))
            return None
        self.kills.pop(0)
        victim = random.randrange(len(processes))
        processes[victim].kill()
        return victim


def test_a_job_that_is_killed_five_times_ends_in_the_same_bits(bucket, tmp_path):
    pytest.importorskip("apache_beam")
    seed = random.randrange(2**16)
    print(f"\nseed {seed}")
    random.seed(seed)
    undisturbed = Job(f"{bucket}/undisturbed", tmp_path / "undisturbed")
    undisturbed.run()
    print(f"undisturbed {undisturbed.worked:.0f} s")
    kills = [random.uniform(0, 0.9 * undisturbed.worked) for _ in range(KILLS)]
    killed = Job(f"{bucket}/killed", tmp_path / "killed", kills)
    killed.run()
    print(f"killed {killed.worked:.0f} s: {killed.told}")
    assert len(killed.told) == KILLS
    found, expected = (f"{job.there}/model/round_2" for job in (killed, undisturbed))
    last = max(int(path.name) for path in (epath.Path(expected) / "checkpoints").iterdir())
    assert_same_bits(state_of(found, last), state_of(expected, last))
    np.testing.assert_array_equal(read_row_losses(found), read_row_losses(expected))
    evaluations = [
        (epath.Path(job.there) / "evaluation" / "evaluation.json").read_text()
        for job in (killed, undisturbed)
    ]
    assert evaluations[0].replace(killed.there, undisturbed.there) == evaluations[1]
