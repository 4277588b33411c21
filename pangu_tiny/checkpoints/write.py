"""A checkpoint of parameters only, written part by part, so that it never lies in memory whole."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from flax.traverse_util import flatten_dict

from pangu_tiny.checkpoints.checksums import MARK, array_handler, write_checksums
from pangu_tiny.checkpoints.read import Leaf, describe, is_finished
from pangu_tiny.errors import UserError, failing_as
from pangu_tiny.model.decoder import parameter_shapes
from pangu_tiny.model.shape import ModelShape
from pangu_tiny.progress import Progress

FLOATS = ("float32", "bfloat16", "float16")
"""Types that parameters may be stored in."""


class Part(NamedTuple):
    """A parameter, or one layer of a stacked one, by its name in `model/decoder.py`."""

    name: str
    layer: int | None
    value: np.ndarray


def parts_of(shape: ModelShape) -> list[tuple[str, int | None]]:
    """Name and layer of every part of a checkpoint, layer after layer."""
    names = list(flatten_dict(parameter_shapes(shape), sep="/"))
    stacked = [name for name in names if name.startswith("blocks/")]
    whole = [(name, None) for name in names if name not in stacked]
    return whole + [(name, layer) for layer in range(shape.depth) for name in stacked]


def write_parts(
    folder: epath.Path,
    shape: ModelShape,
    dtype: str,
    parts: Iterable[Part],
    tokenizer_bytes: bytes,
    *,
    label: str,
    **facts: Any,
) -> epath.Path:
    """Writes step 0 of a folder of checkpoints and returns it; after a kill it is there whole or
    not at all.

    Args:
      dtype: of what is written, one of `FLOATS`.
      parts: every part of `parts_of(shape)` once, in any order; cast to `dtype`. What they raise
        passes through.
      label: of the progress bar.
      facts: what else `about` says.

    Raises:
      UserError: it cannot be written, or values are too large for `dtype`.
      ValueError: a part is missing, comes twice or has another shape.
    """
    done, partial = folder / "0", folder / "0.partial"
    if is_finished(done):
        return done
    for unfinished in (done, partial):
        if unfinished.exists():
            unfinished.rmtree()
    folder.mkdir(parents=True, exist_ok=True)
    kind = np.dtype(dtype)
    # Zeros that take no room, in memory or on disk, make the file of every parameter.
    zeros = jax.tree.map(
        lambda leaf: np.broadcast_to(np.zeros((), kind), leaf.shape), parameter_shapes(shape)
    )
    tokenizer = {"model": np.frombuffer(tokenizer_bytes, np.uint8)}
    about = describe(shape, params_dtype=dtype, step=0, **facts)
    handler = ocp.CompositeCheckpointHandler(
        # In OCDBT's layout what is written over would stay on disk beside it.
        params=array_handler(use_ocdbt=False),
        tokenizer=array_handler(),
        about=ocp.JsonCheckpointHandler(),
    )
    items = ocp.args.Composite(
        params=ocp.args.PyTreeSave(zeros, chunk_by_layer(zeros)),
        tokenizer=ocp.args.PyTreeSave(tokenizer),
        about=ocp.args.JsonSave(about),
    )
    refused = f"checkpoint {done} cannot be written"
    with failing_as(refused), ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(partial, items)
    missing = set(parts_of(shape))
    leaves = {name: Leaf(partial / "params", name, write=True) for name, _ in missing}
    total = sum(int(np.prod(leaf.shape)) for leaf in leaves.values()) * kind.itemsize
    try:
        with Progress(label, total, "B") as progress:
            for part in parts:
                missing.remove(part[:2])
                leaves[part.name].write(cast(part, kind), part.layer)
                progress.update(part.value.size * kind.itemsize)
    except UserError:
        partial.rmtree()
        raise
    if missing:
        raise ValueError(f"never written: {sorted(missing, key=str)}")
    write_checksums(partial)
    # Where renaming is copying (gs://), what was copied half must not pass for a checkpoint.
    mark = (partial / MARK).read_bytes()
    (partial / MARK).unlink()
    partial.rename(done)
    (done / MARK).write_bytes(mark)
    return done


def cast(part: Part, kind: np.dtype) -> np.ndarray:
    """The value of a part in another type; UserError where it is too large for it."""
    if part.value.dtype == kind:
        return part.value
    with np.errstate(over="ignore"):
        value = part.value.astype(kind)
    if lost := int(np.sum(np.isfinite(part.value)) - np.sum(np.isfinite(value))):
        where = part.name if part.layer is None else f"{part.name}, layer {part.layer},"
        raise UserError(f"{where} has {lost:,} values too large for dtype = {str(kind)!r}")
    return value


def chunk_by_layer(params: dict[str, Any]) -> dict[str, Any]:
    """Orbax's save arguments that make every layer of a stacked leaf a chunk of its own on disk."""

    def arguments(path: tuple[Any, ...], leaf: Any) -> ocp.SaveArgs:
        if path[0].key != "blocks":
            return ocp.SaveArgs()
        return ocp.SaveArgs(chunk_byte_size=leaf.nbytes // leaf.shape[0], shard_axes=(0,))

    return jax.tree_util.tree_map_with_path(arguments, params)
