"""Checkpoints for tests, written as training writes them, without training."""

import pathlib
from typing import Any

import jax
import jax.numpy as jnp

from pangu_tiny.checkpoints.read import describe
from pangu_tiny.model.shape import ModelShape
from pangu_tiny.tokenizer.model import Tokenizer
from pangu_tiny.training.checkpoints import Writer
from pangu_tiny.training.optimizer import Optimizer
from pangu_tiny.training.step import TrainState


def flip(file: pathlib.Path, place: int | None = None, length: int = 0) -> None:
    """Flips a bit in the middle of a file, or `length` bytes from `place` on."""
    content = bytearray(file.read_bytes())
    if place is None:
        content[len(content) // 2] ^= 1
    else:
        content[place : place + length] = (byte ^ 255 for byte in content[place : place + length])
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
