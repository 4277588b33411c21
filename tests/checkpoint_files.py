"""Checkpoints for tests, written as training writes them, without training."""

import contextlib
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pangu_tiny.checkpoints.read import describe
from pangu_tiny.checkpoints.run import Writer
from pangu_tiny.model.shape import ModelShape
from pangu_tiny.program.optimizer import Optimizer
from pangu_tiny.program.step import TrainState
from pangu_tiny.tokenizer.model import Tokenizer


def flip(file: pathlib.Path) -> None:
    """Flips a bit in the middle of a file."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@contextlib.contextmanager
def flipped(step: pathlib.Path, share: float) -> Iterator[None]:
    """Within it, 64 bytes are flipped, from the one on that so great a share (0 to 1) of the bytes
    of all files comes before."""
    files = sorted(file for file in step.rglob("*") if file.is_file())
    ends = np.cumsum([file.stat().st_size for file in files])
    place = int(share * ends[-1])
    index = int(np.searchsorted(ends, place, side="right"))
    file, content = files[index], files[index].read_bytes()
    begin = place - int(ends[index]) + len(content)
    damaged = bytes(byte ^ 255 for byte in content[begin : begin + 64])
    file.write_bytes(content[:begin] + damaged + content[begin + 64 :])
    try:
        yield
    finally:
        file.write_bytes(content)


def write_checkpoint(
    workdir: pathlib.Path,
    shape: ModelShape,
    params: dict[str, Any],
    tokenizer: Tokenizer,
    sequence_length: int,
) -> str:
    """Saves parameters as step 1 of a run in `workdir`; returns the path as a stage takes it."""
    optimizer = Optimizer()
    transformation = optimizer.transformation(optimizer.schedule(1, 1))
    zero = jnp.zeros((), jnp.int32)
    params = jax.tree.map(jnp.asarray, params)
    about = describe(
        shape,
        identity={"tokenizer": tokenizer.digest},
        begin_id=tokenizer.begin_id,
        end_id=tokenizer.end_id,
        sequence_length=sequence_length,
        step=1,
    )
    writer = Writer(workdir / "checkpoints", keep_every=1)
    writer.save(
        1,
        TrainState(params, transformation.init(params), zero + 1, zero),
        about,
        tokenizer.model_bytes,
    )
    writer.close()
    return str(workdir)
