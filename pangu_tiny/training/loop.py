"""The steps of a run, one after the other.

A step is started and not waited for. While the devices compute it, this process reads the metrics
of the step before it and fetches the next batch, so that metrics are read one step late; before a
checkpoint or an evaluation, and at the end, those of the step in flight are read as well.

Processes have to save and to stop at the same step, or they would wait for one another for ever.
So each sends what it asks for along with its rows: a checkpoint that is due by its clock, a stop
because of a signal. The step puts them together, and every process finds the same answer among the
metrics. Nothing else has to be exchanged, and nothing waits.
"""

import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from pangu_tiny.program.feed import Feed
from pangu_tiny.program.step import TrainState
from pangu_tiny.topology.processes import anywhere
from pangu_tiny.training.watch import Profile, Signals, Watch


class Run(NamedTuple):
    """What the loop calls.

    Attributes:
      feed, batches: lay out what this process reads.
      evaluate: scores the held-out split of a state, after so many steps.
      save: starts to write a checkpoint of it.
      finish: waits until all checkpoints are written.
      watch, profile: follow the steps.
    """

    step: Callable[..., Any]
    feed: Feed
    batches: Iterator[dict[str, np.ndarray]]
    evaluate: Callable[[TrainState, int], None]
    save: Callable[[TrainState, int], None]
    finish: Callable[[], None]
    watch: Watch
    profile: Profile


def train_steps(
    run: Run,
    state: TrainState,
    steps: int,
    evaluate_every: int,
    save_every: int,
    save_minutes: float,
) -> tuple[int, bool]:
    """Trains up to `steps` steps, those that `state` has taken included.

    Returns:
      Steps taken, and whether a signal asked any process to stop, even after the last step.
    """
    watch, count, saved_at = run.watch, int(state.step), time.monotonic()
    with Signals() as signals, run.profile, watch:
        while count < steps and not watch.stopping:
            run.profile.before(count, state)
            began = time.monotonic()
            rows = next(run.batches)
            waited = time.monotonic() - began
            late = time.monotonic() - saved_at > 60 * save_minutes
            batch = run.feed.place(rows, saves=late, stops=signals.received)
            state, metrics = run.step(state, batch)
            count += 1
            watch.started(count - 1, metrics, waited)
            evaluates = count % evaluate_every == 0 or count == steps
            saves = count % save_every == 0 or count == steps
            if evaluates or saves or watch.saving or watch.stopping:
                watch.settle()
            if evaluates:
                run.evaluate(state, count)
            if saves or watch.saving or watch.stopping:
                run.save(state, count)
                watch.saving, saved_at = False, time.monotonic()
        watch.rest()
        run.finish()
        return count, anywhere(signals.received)
