"""Checkpoints: written asynchronously by Orbax, read strictly, each one describing itself.

A step's folder holds `params` and `optimizer` (arrays; stacked leaves in chunks of one layer),
`tokenizer` (the SentencePiece file as bytes) and `about` (JSON: ModelShape, digests, marks, the
next batch, package versions). A folder counts as a checkpoint if all of it can be read.
"""

import dataclasses
import json
import logging
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from pangu_tiny.errors import UserError
from pangu_tiny.model.decoder import parameter_shapes
from pangu_tiny.model.shape import ModelShape
from pangu_tiny.training.processes import barrier, everywhere, say
from pangu_tiny.training.step import TrainState
from pangu_tiny.workdir import absolute

_ITEMS = ("params", "optimizer", "tokenizer", "about")


class Checkpoint(NamedTuple):
    """What every stage reads from a checkpoint, besides its arrays."""

    path: epath.Path
    shape: ModelShape
    about: dict[str, Any]
    tokenizer_bytes: bytes

    def params(self, shardings: Any = None) -> dict[str, Any]:
        """The parameters as float32 arrays, laid out by `shardings` (a tree) if given.

        Raises:
          UserError: they cannot be read, or are not those of `shape`.
        """
        target = _with_shardings(parameter_shapes(self.shape), shardings)
        try:
            return _restore(self.path, params=target)["params"]
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"checkpoint {self.path} cannot be read: {_reason(error)}") from error


class Writer:
    """The checkpoints of one run, and which of them stay.

    Args:
      folder: where they go, a folder a step.
      keep_every: steps divisible by it stay for good; of all others only what is among the two
        newest.
    """

    def __init__(self, folder: epath.Path, keep_every: int):
        _hush()
        policy = ocp.checkpoint_managers
        options = ocp.CheckpointManagerOptions(
            cleanup_tmp_directories=True,
            preservation_policy=policy.AnyPreservationPolicy(
                [policy.LatestN(n=2), policy.EveryNSteps(interval_steps=keep_every)]
            ),
        )
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        # Orbax would take each for a checkpoint, and count it among those to keep.
        finished = committed_steps(folder)
        for step in _numbered(folder):
            if step not in finished:
                say(f"{folder / str(step)} is no finished checkpoint and is set aside")
                self._set_aside(step)
        self._manager = ocp.CheckpointManager(folder, options=options, item_names=_ITEMS)

    def save(
        self, step: int, state: TrainState, about: dict[str, Any], tokenizer_bytes: bytes
    ) -> None:
        """Starts to write; the state may be consumed as soon as this returns.

        Raises:
          UserError: this checkpoint, or the one before it, could not be written.
        """
        try:
            self._manager.save(
                step,
                force=True,
                args=ocp.args.Composite(
                    params=ocp.args.StandardSave(state.params, _chunk_by_layer(state.params)),
                    optimizer=ocp.args.StandardSave(_beside_params(state)),
                    tokenizer=ocp.args.StandardSave(
                        {"model": np.frombuffer(tokenizer_bytes, np.uint8)}
                    ),
                    about=ocp.args.JsonSave(about),
                ),
            )
        except Exception as error:
            raise self._failed(error) from error

    def wait(self) -> None:
        """Blocks until all that was started is written.

        Raises:
          UserError: it could not be written; the checkpoints before it are still good.
        """
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise self._failed(error) from error

    def close(self) -> None:
        self.wait()
        self._manager.close()

    def _failed(self, error: Exception) -> UserError:
        good = committed_steps(self.folder)
        last = f"the last good one is step {good[0]}" if good else "there is no good one yet"
        return UserError(
            f"a checkpoint could not be saved in {self.folder}, {last}: {_reason(error)}"
        )

    def restore_latest(self, target: TrainState) -> tuple[TrainState, dict[str, Any]] | None:
        """The newest checkpoint that can be read whole, laid out like `target`, and its `about`.

        Newer ones that are damaged are set aside (renamed to STEP.damaged), and said so.

        Raises:
          UserError: a readable checkpoint has another shape or dtype, or none can be read.
        """
        damaged = []
        for step in committed_steps(self.folder):
            path = self.folder / str(step)
            items, reason = None, ""
            try:
                items = _restore(
                    path,
                    about=True,
                    params=target.params,
                    optimizer=_beside_params(target),
                    tokenizer=None,
                )
            except UserError:
                raise
            except Exception as error:
                reason = _reason(error)
            if not everywhere(items is not None):
                say(f"checkpoint {path} is damaged: {reason or 'another process cannot read it'}")
                damaged.append(step)
                continue
            for unreadable in damaged:
                self._set_aside(unreadable)
            if damaged:
                self._manager.reload()
                say(f"going on from step {step}; damaged checkpoints are renamed to STEP.damaged")
            beside = items["optimizer"]
            return TrainState(
                items["params"], beside["moments"], beside["step"], beside["skipped"]
            ), items["about"]
        if damaged:
            raise UserError(
                f"no checkpoint in {self.folder} can be read, of steps {damaged}; to start anew, "
                f"remove that folder"
            )
        return None

    def _set_aside(self, step: int) -> None:
        if jax.process_index() == 0:
            names = (f"{step}.damaged{again}" for again in ("", *range(1, 1000)))
            free = next(name for name in names if not (self.folder / name).exists())
            (self.folder / str(step)).rename(self.folder / free)
        barrier(f"aside-{step}")


def open_checkpoint(path: str) -> Checkpoint:
    """Opens a checkpoint by its path alone.

    Args:
      path: a step's folder, a folder of steps, or the workdir of a run (its newest step).

    Raises:
      UserError: there is no checkpoint, or it is not one of this project's.
    """
    folder = absolute(path)
    for candidate in (folder / "checkpoints", folder):
        if candidate.exists() and (steps := committed_steps(candidate)):
            folder = candidate / str(steps[0])
            break
    if not (folder / "about").exists():
        raise UserError(f"checkpoint {path}: no checkpoint there, expected a train workdir or step")
    try:
        items = _restore(folder, about=True, tokenizer=None)
    except Exception as error:
        raise UserError(f"checkpoint {folder} cannot be read: {_reason(error)}") from error
    about = items["about"]
    shape = ModelShape(**about["model"])
    return Checkpoint(folder, shape, about, items["tokenizer"]["model"].tobytes())


def committed_steps(folder: epath.Path) -> Sequence[int]:
    """Steps whose checkpoint was finished, newest first."""
    return [step for step in _numbered(folder) if _is_finished(folder / str(step))]


def _numbered(folder: epath.Path) -> list[int]:
    names = [path.name for path in folder.iterdir()] if folder.exists() else []
    return sorted((int(name) for name in names if name.isdigit()), reverse=True)


def _is_finished(path: epath.Path) -> bool:
    """Whether Orbax committed this folder: by renaming it, or where renaming is copying (gs://)
    by a marker file, which `is_checkpoint_finalized` looks for."""
    return (path / "_CHECKPOINT_METADATA").exists() and ocp.utils.is_checkpoint_finalized(path)


def describe(shape: ModelShape, **facts: Any) -> dict[str, Any]:
    """The `about` of a checkpoint."""
    return json.loads(json.dumps({"format": 1, "model": dataclasses.asdict(shape), **facts}))


def _beside_params(state: TrainState) -> dict[str, Any]:
    return {"moments": state.optimizer, "step": state.step, "skipped": state.skipped}


def _chunk_by_layer(params: dict[str, Any]) -> dict[str, Any]:
    """Save arguments that make every layer of a stacked leaf a chunk of its own on disk."""

    def arguments(path: tuple[Any, ...], leaf: jax.Array) -> ocp.SaveArgs:
        if path[0].key != "blocks":
            return ocp.SaveArgs()
        return ocp.SaveArgs(chunk_byte_size=leaf.nbytes // leaf.shape[0], shard_axes=(0,))

    return jax.tree_util.tree_map_with_path(arguments, params)


def _restore(path: epath.Path, **items: Any) -> dict[str, Any]:
    """Reads items of a step: a tree of targets (strict), None (as on disk), True (JSON).

    Raises:
      UserError: a leaf is missing, left over, or of another shape or dtype than its target.
    """
    arguments = {}
    for name, target in items.items():
        if target is True:
            arguments[name] = ocp.args.JsonRestore()
            continue
        if target is not None:
            metadata = ocp.StandardCheckpointHandler().metadata(path / name)
            _check(metadata.tree, target, path / name)
        arguments[name] = ocp.args.StandardRestore(target)
    # Not through a Checkpointer: it makes processes wait for one another, and where only one of
    # them meets a damaged file, the others would wait in vain.
    restored = ocp.CompositeCheckpointHandler().restore(path, ocp.args.Composite(**arguments))
    return dict(restored.items())


def _check(found: Any, target: Any, path: epath.Path) -> None:
    """Orbax casts dtypes silently; here every difference is an error that names its leaf."""

    def leaves(tree: Any) -> dict[str, tuple[tuple[int, ...], str]]:
        return {
            "/".join(
                str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key))))
                for key in keys
            ): (
                tuple(leaf.shape),
                str(np.dtype(leaf.dtype)),
            )
            for keys, leaf in jax.tree_util.tree_leaves_with_path(tree)
        }

    there, here = leaves(found), leaves(target)
    for name in sorted(there.keys() | here.keys()):
        if there.get(name) != here.get(name):
            raise UserError(
                f"checkpoint {path}: {name} is {_say(there.get(name))} there, "
                f"{_say(here.get(name))} expected"
            )


def _say(leaf: tuple[tuple[int, ...], str] | None) -> str:
    return "absent" if leaf is None else f"{leaf[1]}{list(leaf[0])}"


def _with_shardings(shapes: Any, shardings: Any) -> Any:
    if shardings is None:
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        shardings = jax.tree.map(lambda _: device, shapes)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        shardings,
    )


def _hush() -> None:
    """Silences what Orbax's and TensorStore's threads print of a write that fails, a stack trace
    for every chunk that was under way: `save` or `wait` raises it."""
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    before = sys.unraisablehook
    if not isinstance(before, _WithoutLoops):
        sys.unraisablehook = _WithoutLoops(before)


class _WithoutLoops(NamedTuple):
    """A `sys.unraisablehook` that lets pass all but what a write says to a loop that has gone."""

    before: Callable[[Any], None]

    def __call__(self, unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            self.before(unraisable)


def _reason(error: Exception) -> str:
    """The first line of a library's message, which may be pages long or empty; where it names the
    file at its start, it names the cause at its end."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0] if len(lines[0]) < 300 else f"{lines[0][:100]} … {lines[0][-200:]}"
