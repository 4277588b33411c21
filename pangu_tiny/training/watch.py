"""What is watched while steps go by: metrics, losses of rows, signals, a profile."""

import dataclasses
import math
import signal
import time
from typing import Any

import jax
from etils import epath

from pangu_tiny.checkpoints.read import committed_steps
from pangu_tiny.checkpoints.run import Writer
from pangu_tiny.data.dataset import TokenDataset
from pangu_tiny.errors import Diverged, UserError, check_number
from pangu_tiny.program.step import Metrics
from pangu_tiny.progress import Progress
from pangu_tiny.topology.processes import alone
from pangu_tiny.training.held_out import HeldOut
from pangu_tiny.training.metrics import MetricsLog, RowLosses, peak_flops
from pangu_tiny.training.watchdog import Watchdog


@dataclasses.dataclass(frozen=True)
class Watching:
    """What of a run is written down, beside the intervals of `train`.

    Attributes:
      log_every: steps between metrics.
      evaluate_rows: how many held-out rows are scored each time, the same ones, spread evenly over
        the split; None is all, as `evaluate` does it. Bits per byte are then an estimate, see
        `training/held_out.py`. Chosen so that at 1,024 rows a step it costs the work of 3 steps.
      keep_every: steps between checkpoints that stay for good, a multiple of `train.save_every`. Of
        all others the newest two are there; None keeps only these, so that a run takes no more room
        the longer it is.
      drop_moments: checkpoints that stay lose the moments of Adam, two thirds of their size, once
        they are not among the newest two. No run can resume from them, but a new one can start.
      save_minutes: minutes between checkpoints in any case.
      watchdog_minutes: of several processes, minutes after which a step that does not come back
        ends the run; 10 times the median step, if that is longer; None never. Chosen well above
        what reading rows from a mount may be held up.
      tensorboard: whether to write TensorBoard events.
      profile_steps: [first, last] step to write a JAX profile of, into workdir/profile.
    """

    log_every: int = 10
    evaluate_rows: int | None = 8192
    keep_every: int | None = None
    drop_moments: bool = False
    save_minutes: float = 15.0
    watchdog_minutes: float | None = 10.0
    tensorboard: bool = True
    profile_steps: list[int] | None = None

    def __post_init__(self):
        for name in ("log_every", "evaluate_rows", "keep_every"):
            check_number(f"Watching.{name}", getattr(self, name), 1)
        check_number("Watching.save_minutes", self.save_minutes, 0)
        check_number("Watching.watchdog_minutes", self.watchdog_minutes, above=0)
        steps = self.profile_steps
        if steps is not None and (len(steps) != 2 or not 0 <= steps[0] <= steps[1]):
            raise UserError(f"Watching.profile_steps is {steps}, expected [first, last], from 0")


WATCHING = Watching()


class Watch:
    """Follows the steps of a run, a step late (see `training/loop.py`); process 0 alone writes down
    what it reads.

    Args:
      steps: of the run, of which `start` are done.
      tokens: of a step.
      flops: of a token.
      stop_nonfinite: whether a loss that is not finite ends the run.

    Attributes:
      saving, stopping: whether a process asked for that in the last step that was read.
    """

    def __init__(
        self,
        folder: epath.Path,
        dataset: TokenDataset,
        writer: Writer,
        watching: Watching,
        *,
        steps: int,
        start: int,
        tokens: int,
        flops: int,
        stop_nonfinite: bool,
    ):
        self._dataset, self._writer, self._steps = dataset, writer, steps
        self._tokens, self._flops = tokens, flops
        self._stop_nonfinite, self._log_every = stop_nonfinite, watching.log_every
        with alone() as self._leads:
            self._log = MetricsLog(folder, start, watching.tensorboard) if self._leads else None
            self._losses = RowLosses(folder, start) if self._leads else None
            self._progress = Progress("train", steps, "step", start) if self._leads else None
        self._last_step, self._last_time, self._waited = start, time.monotonic(), 0.0
        self._in_flight: tuple[int, Metrics] | None = None
        self._watchdog = Watchdog(watching.watchdog_minutes)
        self.saving = self.stopping = False

    def started(self, step: int, metrics: Metrics, waited: float) -> None:
        """To be called when a step was started; reads the metrics of the one before it.

        Args:
          waited: seconds that the step had to wait for its rows.
        """
        self._waited += waited
        self.settle()
        self._in_flight = step, metrics

    def settle(self) -> None:
        """Reads the metrics of the step in flight, and acts on them."""
        if self._in_flight is None:
            return
        step, metrics = self._in_flight
        self._in_flight = None
        metrics = jax.device_get(metrics)
        self._watchdog.finished(step)
        if not metrics.finite and self._stop_nonfinite:
            raise self._not_finite(step, metrics)
        self.saving |= bool(metrics.requests[0])
        self.stopping |= bool(metrics.requests[1])
        with alone() as leads:
            if leads:
                self._losses.add(step, metrics.row_ids, metrics.row_nats, metrics.row_targets)
                self._progress.update(1, loss=f"{metrics.loss:.3f}")
                if (step + 1) % self._log_every == 0 or step + 1 == self._steps:
                    self._log_step(step, metrics)

    def alive(self, rows: int = 0) -> None:
        """To be called when held-out rows, or anything but a step, have come back."""
        self._watchdog.alive()

    def rest(self) -> None:
        """To be called before checkpoints are waited for; until `alive`, steps are not."""
        self._watchdog.rest()

    def flush(self, end: int) -> None:
        """Writes what was found out of the steps before `end`."""
        with alone() as leads:
            if leads:
                self._losses.flush(end)
                self._log.flush(end)

    def log_held_out(self, step: int, scored: HeldOut, seconds: float) -> None:
        """Takes a held-out loss; the seconds that it took are not those of the steps."""
        self._last_time += seconds
        figures, rows = scored.figures(self._dataset), self._dataset.count("held_out")
        count, names = len(scored.row_ids), ("nats_per_token", "bits_per_byte")
        part = f" (estimated from {count:,} of {rows:,} rows)" if count < rows else ""
        with alone() as leads:
            if leads:
                self._log.log(step, **{f"held_out_{name}": figures[name] for name in names})
                self._progress.say(
                    f"step {step + 1}: held-out {figures['bits_per_byte']:.4f} bits per byte, "
                    f"{figures['nats_per_token']:.4f} nats per token{part}"
                )

    def _log_step(self, step: int, metrics: Metrics) -> None:
        now = time.monotonic()
        elapsed = now - self._last_time
        speed = (step + 1 - self._last_step) * self._tokens / elapsed
        figures = {
            "loss": float(metrics.loss),
            "learning_rate": float(metrics.learning_rate),
            "gradient_norm": float(metrics.gradient_norm),
            "tokens_per_second": round(speed, 1),
            "data_wait_share": round(self._waited / elapsed, 4),
        }
        if peak := peak_flops():
            figures["mfu"] = round(speed * self._flops / peak, 4)
        if metrics.skipped:
            figures["skipped_steps"] = int(metrics.skipped)
        self._log.log(step, **figures)
        self._last_step, self._last_time, self._waited = step + 1, now, 0.0

    def _not_finite(self, step: int, metrics: Metrics) -> Diverged:
        self._writer.wait()
        folder = self._writer.folder
        # One of this very step may hold what the loss came from.
        good = [saved for saved in committed_steps(folder) if saved < step]
        return Diverged(
            f"step {step}: loss {metrics.loss} and gradient norm {metrics.gradient_norm} are not "
            f"finite; the last checkpoint that finite steps followed is "
            f"{folder / str(good[0]) if good else 'none'}; a lower Optimizer.learning_rate, or "
            f"Optimizer.skip_nonfinite=True, may get past it"
        )

    def __enter__(self) -> "Watch":
        return self

    def __exit__(self, *_: Any) -> None:
        self._watchdog.close()
        if self._leads:
            self._progress.close()
            self._log.close()


class Signals:
    """Remembers SIGTERM and the first ^C, so that the run saves and leaves; a second ^C kills."""

    def __init__(self):
        self.received = False

    def __enter__(self) -> "Signals":
        self._before: dict[int, Any] = {
            number: signal.signal(number, self._receive)
            for number in (signal.SIGTERM, signal.SIGINT)
        }
        return self

    def _receive(self, number: int, _: Any) -> None:
        self.received = True
        signal.signal(number, self._before[number])

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


class Profile:
    """Writes a JAX profile of the steps [first, last] into workdir/profile."""

    def __init__(self, folder: epath.Path, steps: list[int] | None):
        self._folder = str(folder / "profile")
        self._first, self._last = steps or (math.inf, math.inf)  # type: ignore[var-annotated]
        self._running = False

    def before(self, step: int, state: Any) -> None:
        """To be called before each step, with the state that it starts from."""
        if not self._running and self._first <= step <= self._last:
            jax.profiler.start_trace(self._folder)
            self._running = True
        elif self._running and step > self._last:
            jax.block_until_ready(state)  # the last step may still be under way
            self._end()

    def _end(self) -> None:
        jax.profiler.stop_trace()
        self._running = False

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, *_: Any) -> None:
        if self._running:
            self._end()
