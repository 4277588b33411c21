"""Programs whose speed is measured: those that the stages run, on what needs no folder.

Parameters are random and rows too; neither decides how long a step takes.
"""

import gc
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pangu_tiny.data.rows import Marks
from pangu_tiny.evaluation.decoding import PIECE, advance, continuations, step_shapes
from pangu_tiny.evaluation.sampling import GREEDY
from pangu_tiny.model.cached import by_layer
from pangu_tiny.model.decoder import init_params
from pangu_tiny.model.shape import ModelShape
from pangu_tiny.planning.memory import need
from pangu_tiny.program.build import Program, build, build_training
from pangu_tiny.program.feed import Feed
from pangu_tiny.program.step import init_state
from pangu_tiny.rounds.score_batches import scoring_layout
from pangu_tiny.topology.mesh import batch_shards

_MARKS = Marks(1, 2)  # no program depends on them but for constants
_STRETCH = 16  # tokens that are drawn between two looks at them


class Sizes(NamedTuple):
    """How much is asked at once.

    Attributes:
      batch: sequences that are continued.
      prompt, new: tokens of each prompt, and of what follows it.
      length: of the rows of training, scoring and of prompts that are read.
    """

    batch: int
    prompt: int
    new: int
    length: int


class Timed(NamedTuple):
    """A program, ready to be run.

    Attributes:
      run: once, until its result is there.
      sequences, tokens, flops: of one run, over all devices; flops as MFU counts them.
      compile_seconds: None where the first run tells.
      bytes: that one device needs for arguments, results and what lies between.
    """

    run: Callable[[], object]
    sequences: int
    tokens: int
    flops: int
    compile_seconds: float | None
    bytes: int


class Speed(NamedTuple):
    """Seconds of every run after the first, and what else was found."""

    seconds: list[float]
    sequences: int
    tokens: int
    flops: int
    compile_seconds: float
    bytes: int

    @property
    def tokens_per_second(self) -> float:
        """Of the median run."""
        return self.tokens / statistics.median(self.seconds)

    @property
    def spread(self) -> tuple[float, float]:
        """Tokens a second of the slowest run and of the fastest."""
        return self.tokens / max(self.seconds), self.tokens / min(self.seconds)


def measured(timed: Timed, rounds: int, after_run: Callable[[], None]) -> Speed:
    """Runs it once, then as often as asked."""
    taken = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        timed.run()
        taken.append(time.perf_counter() - start)
        after_run()
    first, *seconds = taken
    compiled = timed.compile_seconds
    if compiled is None:
        compiled = max(first - statistics.median(seconds), 0.0)
    return Speed(seconds, *timed[1:4], compiled, timed.bytes)


def ready(name: str, shape: ModelShape, bound: dict[str, Any], sizes: Sizes) -> Timed:
    """One of `PROGRAMS` for a shape, on all devices.

    Args:
      bound: settings of the stage train.
    """
    gc.collect()  # of the program before
    program = build(shape, bound["hardware"], _MARKS, bound["dtype"], bound["z_loss"])
    made: Timed = PROGRAMS[name](program, bound, sizes)
    return made


def _train(program: Program, bound: dict[str, Any], sizes: Sizes) -> Timed:
    mesh, hardware = program.mesh, program.hardware
    batch = bound["global_batch"] or hardware.per_device_batch * batch_shards(mesh)
    training = build_training(program, bound["optimizer"], bound["steps"], batch, sizes.length)
    layout = training.layout
    arguments = (training.state, layout.abstract(sizes.length))
    step, seconds, needed = _compiled(program, training.step, arguments)
    feed = Feed(layout)
    rows = _rows(program, (len(feed.positions), sizes.length + 1))
    placed = feed.place({"rows": rows, "row_ids": np.arange(len(feed.positions))})
    decoder = program.objective.decoder
    state = [init_state(decoder, training.optimizer, "constant", 0, mesh)]

    def run() -> None:
        state[0], metrics = step(state[0], placed)
        jax.block_until_ready((state[0], metrics))

    tokens = batch * sizes.length
    flops = tokens * program.shape.flops_per_token(sizes.length)
    return Timed(run, batch, tokens, flops, seconds, needed)


def _score(program: Program, bound: dict[str, Any], sizes: Sizes) -> Timed:
    layout = scoring_layout(program.mesh, program.hardware, None)
    rows_bt = layout.abstract_rows(sizes.length)
    step, seconds, needed = _compiled(program, program.score, (program.params, rows_bt))
    params, rows = _params(program, jnp.float32), _rows(program, rows_bt.shape)
    placed = jax.make_array_from_callback(rows.shape, rows_bt.sharding, lambda index: rows[index])

    def run() -> None:
        jax.block_until_ready(step(params, placed))

    tokens = layout.rows * sizes.length
    flops = tokens * program.shape.flops_per_token(sizes.length) // 3
    return Timed(run, layout.rows, tokens, flops, seconds, needed)


def _decode(program: Program, bound: dict[str, Any], sizes: Sizes) -> Timed:
    batch, prompt, new = sizes.batch, sizes.prompt, sizes.new
    flops = batch * new * program.shape.flops_per_token(prompt + new) // 3
    return _continued(program, batch, prompt, new, 1)._replace(tokens=batch * new, flops=flops)


def _prefill(program: Program, bound: dict[str, Any], sizes: Sizes) -> Timed:
    """The head is applied to the last position alone."""
    batch, length, shape = sizes.batch, sizes.length, program.shape
    head = 2 * shape.vocab_size * shape.width * batch * (length - 1)
    flops = batch * length * shape.flops_per_token(length) // 3 - head
    timed = _continued(program, batch, length, 1, min(PIECE, length))
    return timed._replace(tokens=batch * length, flops=flops)


def _continued(program: Program, batch: int, prompt: int, new: int, at_once: int) -> Timed:
    """The likeliest tokens that follow prompts, not yet counted; the need is that of the program
    that takes so many positions at once."""
    decoder, mesh = program.objective.decoder, program.mesh
    filled = -(-batch // batch_shards(mesh)) * batch_shards(mesh)
    params, ids_bt, *others = step_shapes(decoder, mesh, filled, prompt + new + _STRETCH)
    ids_bt = jax.ShapeDtypeStruct((filled, at_once), jnp.int32, sharding=ids_bt.sharding)
    chosen = {"decoder": decoder, "vocab_size": program.shape.vocab_size, "sampling": GREEDY}
    *_, needed = _compiled(program, advance, (params, ids_bt, *others), **chosen)
    layers = by_layer(_params(program, decoder.dtype))
    prompts = _rows(program, (batch, prompt)).tolist()

    def run() -> None:
        with jax.set_mesh(mesh):
            for _ in continuations(decoder, layers, prompts, new, stretch=min(_STRETCH, new)):
                pass

    return Timed(run, batch, 0, 0, None, needed)


PROGRAMS: dict[str, Callable[[Program, dict[str, Any], Sizes], Timed]] = {
    "decode": _decode,
    "prefill": _prefill,
    "score": _score,
    "train": _train,
}
"""decode: what follows prompts, token by token. prefill: prompts, up to the first that follows.
score: a step of score-batches. train: a step of train."""


def _compiled(
    program: Program, function: Any, arguments: tuple[Any, ...], **settings: Any
) -> tuple[Any, float, int]:
    """A compiled function, the seconds that took, and the bytes that one device needs."""
    start = time.perf_counter()
    with jax.set_mesh(program.mesh):
        compiled = function.lower(*arguments, **settings).compile()
    return compiled, time.perf_counter() - start, need(compiled.memory_analysis())


def _params(program: Program, dtype: Any) -> dict[str, Any]:
    """Random parameters in their layout."""

    def create() -> dict[str, Any]:
        params = init_params(program.shape, "constant", jax.random.key(0))
        return jax.tree.map(lambda leaf: leaf.astype(dtype), params)

    with jax.set_mesh(program.mesh):
        return jax.jit(create, out_shardings=program.param_shardings)()


def _rows(program: Program, size: tuple[int, ...]) -> np.ndarray:
    """Random ids that are no marks."""
    random = np.random.default_rng(0)
    return random.integers(3, program.shape.vocab_size, size).astype(np.int32)
