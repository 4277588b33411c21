"""Checkpoints of a training run: written asynchronously by Orbax, kept or dropped, resumed from."""

from typing import Any

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
from etils import epath

from pangu_tiny.checkpoints import checksums
from pangu_tiny.checkpoints.checksums import AboutHandler, array_handler
from pangu_tiny.checkpoints.quiet import hold_traces, ignore_leftovers, release_traces
from pangu_tiny.checkpoints.read import committed_steps, numbered, restore, unreadable
from pangu_tiny.checkpoints.write import chunk_by_layer
from pangu_tiny.errors import UserError, kind_of, reason
from pangu_tiny.program.step import TrainState
from pangu_tiny.topology.processes import alone, from_first, gather, led, say

_NEWEST = 2
"""Checkpoints that are there in any case: one for when the other is damaged."""


class Writer:
    """The checkpoints of one run, and which of them stay.

    Args:
      folder: where they go, a folder a step.
      keep_every: steps divisible by it stay for good; of all others only what is among the two
        newest.
      drop_moments: whether what stays loses the optimizer's state once it is not among the two
        newest.
    """

    def __init__(
        self, folder: epath.Path, keep_every: int | None = None, drop_moments: bool = False
    ):
        policy = ocp.checkpoint_managers
        kept = [policy.LatestN(n=_NEWEST)]
        if keep_every:
            kept.append(policy.EveryNSteps(interval_steps=keep_every))
        options = ocp.CheckpointManagerOptions(
            cleanup_tmp_directories=True,
            single_host_load_and_broadcast=True,
            preservation_policy=policy.AnyPreservationPolicy(kept),
        )
        self.folder = folder
        with led() as leads:
            if leads:
                folder.mkdir(parents=True, exist_ok=True)
                # Orbax would take each for a checkpoint, and count it among those to keep.
                for step in set(numbered(folder)) - set(committed_steps(folder)):
                    say(f"{folder / str(step)} is no finished checkpoint and is set aside")
                    self._set_aside(step)
        handlers = ocp.handlers.DefaultCheckpointHandlerRegistry()
        for item in ("params", "optimizer", "tokenizer"):
            handlers.add(item, ocp.args.PyTreeSave, array_handler())
        handlers.add("about", ocp.args.JsonSave, AboutHandler())
        self._manager = ocp.CheckpointManager(folder, options=options, handler_registry=handlers)
        self._keep_every, self._drop_moments = keep_every, drop_moments

    def room(self, steps: int, state: TrainState) -> str:
        """What the checkpoints of a run of so many steps will take, in a line."""
        kept = len(range(self._keep_every, steps + 1, self._keep_every)) if self._keep_every else 0
        whole = sum(leaf.nbytes for leaf in jax.tree.leaves(state)) / 1e9
        params = sum(leaf.nbytes for leaf in jax.tree.leaves(state.params)) / 1e9
        each = params if self._drop_moments else whole
        line = f"checkpoints of {whole:,.3g} GB, of which the newest {_NEWEST} are there"
        if kept:
            every = f"every {self._keep_every:,} steps"
            line += f"; one of {each:,.3g} GB {every} stays, {kept:,} in all"
        return f"{line}: at most {_NEWEST * whole + kept * each:,.3g} GB"

    def save(
        self, step: int, state: TrainState, about: dict[str, Any], tokenizer_bytes: bytes
    ) -> None:
        """Starts to write; the state may be consumed as soon as this returns."""
        self.wait()
        hold_traces()
        ignore_leftovers()
        try:
            self._manager.save(
                step,
                force=True,
                args=ocp.args.Composite(
                    params=ocp.args.PyTreeSave(state.params, chunk_by_layer(state.params)),
                    optimizer=ocp.args.PyTreeSave(_beside_params(state)),
                    tokenizer=ocp.args.PyTreeSave(
                        {"model": np.frombuffer(tokenizer_bytes, np.uint8)}
                    ),
                    about=ocp.args.JsonSave(about),
                ),
            )
        except Exception as error:
            raise self._failed(error) from error

    def wait(self) -> None:
        """Blocks until all that was started is written."""
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise self._failed(error) from error
        release_traces()
        with alone() as leads:
            if leads and self._drop_moments:
                for step in committed_steps(self.folder)[_NEWEST:]:
                    checksums.drop_item(self.folder / str(step), "optimizer")

    def close(self) -> None:
        self.wait()
        self._manager.close()

    def _failed(self, error: Exception) -> UserError:
        saved = committed_steps(self.folder)
        last = f"the last that was saved is step {saved[0]}" if saved else "none was saved yet"
        said = f"a checkpoint could not be saved in {self.folder}, {last}: {reason(error)}"
        return kind_of(error)(said)

    def restore_latest(self, target: TrainState) -> tuple[TrainState, dict[str, Any]] | None:
        """The newest checkpoint that can be read whole, laid out like `target`, and its `about`.

        Newer ones that are damaged are set aside (renamed to STEP.damaged), and said so.
        """
        damaged: dict[int, str] = {}
        for step in from_first(lambda: committed_steps(self.folder)):
            restored, why = self._restore(step, target)
            reasons = [other for other in gather(why) if other]
            if reasons:
                damaged[step] = reasons[0]
                continue
            with led() as leads:
                for unreadable, why in damaged.items() if leads else ():
                    aside = self._set_aside(unreadable)
                    say(
                        f"checkpoint {self.folder / str(unreadable)} is damaged, renamed to "
                        f"{aside}, resuming from step {step}: {why}"
                    )
            if damaged:
                self._manager.reload()
            return restored
        if damaged:
            listed = "; ".join(f"{step}: {why}" for step, why in damaged.items())
            raise UserError(
                f"no checkpoint in {self.folder} can be read ({listed}); to start anew, remove "
                f"that folder"
            )
        return None

    def _restore(
        self, step: int, target: TrainState
    ) -> tuple[tuple[TrainState, dict[str, Any]] | None, str]:
        """State and `about` as this process reads them, or None and why it cannot."""
        path = self.folder / str(step)
        try:
            checksums.check(path)
            if not (path / "optimizer").exists():
                raise UserError(
                    f"checkpoint {path} was kept without moments, no run can resume from it; a new "
                    f"one can start from it, with train.checkpoint = {str(path)!r}"
                )
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
            return None, reason(error)
        beside = items["optimizer"]
        state = TrainState(items["params"], beside["moments"], beside["step"], beside["skipped"])
        return (state, items["about"]), ""

    def _set_aside(self, step: int) -> str:
        """Renames a step's folder, in the first process; returns its new name."""
        names = (f"{step}.damaged{again}" for again in ("", *range(1, 1000)))
        free = next(name for name in names if not (self.folder / name).exists())
        (self.folder / str(step)).rename(self.folder / free)
        return free


def with_moments(state: TrainState, path: epath.Path, target: TrainState) -> TrainState:
    """A fresh state with the moments of Adam, and their count, from another run's step; `target`
    has the shapes and layouts, as `abstract_state` gives them."""
    try:
        found = restore(path, optimizer=_beside_params(target))["optimizer"]["moments"]
    except UserError:
        raise
    except Exception as error:
        raise unreadable(path, error) from error
    taken = jax.tree.map(
        lambda new, old: old if isinstance(new, optax.ScaleByAdamState) else new,
        state.optimizer,
        found,
        is_leaf=lambda node: isinstance(node, optax.ScaleByAdamState),
    )
    return state._replace(optimizer=taken)


def _beside_params(state: TrainState) -> dict[str, Any]:
    return {"moments": state.optimizer, "step": state.step, "skipped": state.skipped}
