"""Compile time of the train step at 42 layers against 21, scanned: the ratio is to be 1.2 at most.

python tests/benchmarks/compile_time.py
"""

import statistics
import time

import jax
import jax.numpy as jnp

from pangu_tiny.model.decoder import Decoder
from pangu_tiny.model.shape import ModelShape
from pangu_tiny.program.optimizer import Optimizer
from pangu_tiny.program.step import Batch, Objective, TrainState, init_params, train_step
from pangu_tiny.topology.mesh import make_mesh

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
    decoder = Decoder(shape, jnp.bfloat16, remat=remat)
    optimizer = Optimizer()
    schedule = optimizer.schedule(100, ROWS * LENGTH)
    transformation = optimizer.transformation(schedule)
    mesh = make_mesh(1, 1, 1, jax.devices()[:1])
    count = jax.ShapeDtypeStruct((), jnp.int32)

    def create():
        params = init_params(shape, "constant", jax.random.key(0))
        return params, transformation.init(params)

    state = TrainState(*jax.eval_shape(create), count, count)
    batch = Batch(
        jax.ShapeDtypeStruct((1, ROWS, LENGTH + 1), jnp.int32),
        jax.ShapeDtypeStruct((1, ROWS), jnp.int32),
        jax.ShapeDtypeStruct((1, 2), bool),
    )
    with jax.set_mesh(mesh):
        objective = Objective(decoder, 1, 2, loss_chunk=256)
        step = train_step(objective, transformation, schedule, mesh)
        began = time.monotonic()
        step.lower(state, batch).compile()
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
