"""Compile time of the train step at 42 layers against 21, scanned: the ratio is to be 1.2 at most.

python tests/benchmarks/compile_time.py
"""

import statistics
import time

import jax

from pangu_tiny.data.rows import Marks
from pangu_tiny.model.shape import ModelShape
from pangu_tiny.program.build import build, build_training
from pangu_tiny.program.optimizer import Optimizer
from pangu_tiny.topology.hardware import Hardware

ROWS, LENGTH, REPEATS = 4, 128, 5


def compile_seconds(depth: int, remat: str) -> float:
    """Lowering and compilation of a step that was never seen before."""
    shape = ModelShape(
        depth=depth,
        width=128,
        heads=4,
        ffn_width=352,
        vocab_size=1024,
        series_terms=2,
        shortcut_ratio=32,
    )
    jax.clear_caches()
    hardware = Hardware(remat=remat, per_device_batch=ROWS, loss_chunk=256)
    program = build(shape, hardware, Marks(1, 2), "bfloat16", devices=jax.devices()[:1])
    training = build_training(program, Optimizer(), 100, ROWS, LENGTH)
    with jax.set_mesh(program.mesh):
        began = time.monotonic()
        training.step.lower(training.state, training.layout.abstract(LENGTH)).compile()
        return time.monotonic() - began


def main() -> None:
    compile_seconds(2, "none")  # whatever is only paid once
    for remat in ("none", "full"):
        seconds = {21: [], 42: []}
        for _ in range(REPEATS):
            for depth, found in seconds.items():
                found.append(compile_seconds(depth, remat))
        shallow, deep = (statistics.median(found) for found in seconds.values())
        print(
            f"remat {remat}: {shallow:.2f} s at 21 layers, {deep:.2f} s at 42, "
            f"ratio {deep / shallow:.3f}"
        )


if __name__ == "__main__":
    main()
