"""Checkpoints of a training run: written asynchronously by Orbax, kept or dropped, resumed from."""

import logging
import sys
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
from etils import epath

from pangu_tiny.checkpoints.read import committed_steps, numbered, reason, restore
from pangu_tiny.checkpoints.write import chunk_by_layer
from pangu_tiny.errors import UserError
from pangu_tiny.training.processes import everywhere, from_first, led, say
from pangu_tiny.training.step import TrainState

_ITEMS = ("params", "optimizer", "tokenizer", "about")


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
            single_host_load_and_broadcast=True,
            preservation_policy=policy.AnyPreservationPolicy(
                [policy.LatestN(n=2), policy.EveryNSteps(interval_steps=keep_every)]
            ),
        )
        self.folder = folder
        with led() as leads:
            if leads:
                folder.mkdir(parents=True, exist_ok=True)
                # Orbax would take each for a checkpoint, and count it among those to keep.
                for step in set(numbered(folder)) - set(committed_steps(folder)):
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
                    params=ocp.args.StandardSave(state.params, chunk_by_layer(state.params)),
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
            f"a checkpoint could not be saved in {self.folder}, {last}: {reason(error)}"
        )

    def restore_latest(self, target: TrainState) -> tuple[TrainState, dict[str, Any]] | None:
        """The newest checkpoint that can be read whole, laid out like `target`, and its `about`.

        Newer ones that are damaged are set aside (renamed to STEP.damaged), and said so.

        Raises:
          UserError: a readable checkpoint has another shape or dtype, or none can be read.
        """
        damaged = []
        for step in from_first(lambda: committed_steps(self.folder)):
            path = self.folder / str(step)
            items, why = None, ""
            try:
                items = restore(
                    path,
                    about=True,
                    params=target.params,
                    optimizer=_beside_params(target),
                    tokenizer=None,
                )
            except UserError:
                raise
            except Exception as error:
                why = reason(error)
            if not everywhere(items is not None):
                say(f"checkpoint {path} is damaged: {why or 'another process cannot read it'}")
                damaged.append(step)
                continue
            with led() as leads:
                for unreadable in damaged if leads else ():
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
        names = (f"{step}.damaged{again}" for again in ("", *range(1, 1000)))
        free = next(name for name in names if not (self.folder / name).exists())
        (self.folder / str(step)).rename(self.folder / free)


def with_moments(state: TrainState, path: epath.Path, target: TrainState) -> TrainState:
    """A fresh state with the moments of Adam, and their count, from another run's checkpoint.

    Args:
      state: the fresh state.
      path: a step's folder.
      target: shapes and layouts, as `abstract_state` gives them.

    Raises:
      UserError: they cannot be read, or are of another shape.
    """
    try:
        found = restore(path, optimizer=_beside_params(target))["optimizer"]["moments"]
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"checkpoint {path} cannot be read: {reason(error)}") from error
    taken = jax.tree.map(
        lambda new, old: old if isinstance(new, optax.ScaleByAdamState) else new,
        state.optimizer,
        found,
        is_leaf=lambda node: isinstance(node, optax.ScaleByAdamState),
    )
    return state._replace(optimizer=taken)


def _beside_params(state: TrainState) -> dict[str, Any]:
    return {"moments": state.optimizer, "step": state.step, "skipped": state.skipped}


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
