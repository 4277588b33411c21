"""How much faster the step of score-batches is than that of train, per token: they take turns.

python tests/benchmarks/score_speed.py [--gin_file=hardware/cpu.gin] [--rounds=6] [--steps=4]

The compiled steps of both stages on the same rows of a 20M LLaMA shape: a training step of 16
sequences of 256 tokens, and as many sequences a time as score-batches takes by itself. The aim is
2.5 times.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import jax
import numpy as np
from train_speed import BATCH, SEQUENCE, SHAPE

from pangu_tiny import config
from pangu_tiny.data.rows import Marks
from pangu_tiny.model.shape import ModelShape
from pangu_tiny.program.batch import Batch, BatchLayout, most_scored_at_once
from pangu_tiny.program.build import build, build_training
from pangu_tiny.program.feed import Feed
from pangu_tiny.program.optimizer import Optimizer
from pangu_tiny.program.step import init_state
from pangu_tiny.topology.hardware import Hardware


def main(options: argparse.Namespace) -> None:
    hardware = config.build(Hardware, options.gin_file)
    program = build(ModelShape(**SHAPE), hardware, Marks(1, 2), "float32")
    training = build_training(program, Optimizer(learning_rate=3e-4), 1000, BATCH, SEQUENCE)
    random = np.random.default_rng(0)

    def rows(layout: BatchLayout) -> Batch:
        ids = random.integers(3, SHAPE["vocab_size"], (layout.rows, SEQUENCE + 1))
        local = {"rows": ids.astype(np.int32), "row_ids": np.arange(layout.rows)}
        return Feed(layout).place(local)

    at_once = most_scored_at_once(program.mesh, hardware.per_device_batch)
    trained = rows(training.layout)
    scored = rows(BatchLayout(program.mesh, 1, at_once)).rows_abt[0]
    decoder = program.objective.decoder
    state = [init_state(decoder, training.optimizer, "constant", 0, program.mesh)]
    with jax.set_mesh(program.mesh):

        def train_once() -> None:
            state[0], _ = training.step(state[0], trained)
            jax.block_until_ready(state[0])

        def score_once() -> None:
            jax.block_until_ready(program.score(state[0].params, scored))

        stages: dict[str, tuple[Callable[[], None], int]] = {
            "train": (train_once, BATCH),
            "score-batches": (score_once, at_once),
        }
        speeds: dict[str, list[float]] = {name: [] for name in stages}
        for number in range(options.rounds + 1):
            for name, (run, count) in stages.items():
                for _ in range(options.steps):
                    began = time.perf_counter()
                    run()
                    if number:  # the first ones compile
                        speeds[name].append(count * SEQUENCE / (time.perf_counter() - began))
    medians = {name: statistics.median(found) for name, found in speeds.items()}
    for name, found in speeds.items():
        low, _, high = statistics.quantiles(found, n=4)
        print(
            f"{name:14} {medians[name]:8,.0f} tokens/s, median of {len(found)} steps, "
            f"quartiles {low:,.0f} to {high:,.0f}"
        )
    print(f"{medians['score-batches'] / medians['train']:.2f} times as fast")


if __name__ == "__main__":
    from pangu_tiny.topology.host import keep_freed_memory

    keep_freed_memory()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gin_file", default="hardware/cpu.gin")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=4)
    main(parser.parse_args())
