"""What is watched while steps go by: figures, losses per row, signals, a profile."""

import math
import signal
import time
from typing import Any

import jax
from etils import epath

from pangu_tiny.checkpoints.read import committed_steps
from pangu_tiny.checkpoints.run import Writer
from pangu_tiny.data.dataset import TokenDataset
from pangu_tiny.errors import UserError
from pangu_tiny.model.shape import ModelShape
from pangu_tiny.program.feed import Feed
from pangu_tiny.program.optimizer import Optimizer
from pangu_tiny.program.step import Metrics
from pangu_tiny.progress import Progress
from pangu_tiny.topology.processes import alone, say
from pangu_tiny.training.held_out import HeldOut
from pangu_tiny.training.metrics import (
    MFU_FORMULA,
    MetricsLog,
    RowLosses,
    peak_flops,
)


class Watch:
    """What is watched while the steps go by; only process 0 writes it down."""

    def __init__(
        self,
        *,
        folder: epath.Path,
        rows: TokenDataset,
        steps: int,
        tokens_per_step: int,
        flops_per_token: int,
        stop_nonfinite: bool,
        log_every: int,
        start: int,
        tensorboard: bool,
    ):
        self._rows, self._steps = rows, steps
        self._tokens, self._flops = tokens_per_step, flops_per_token
        self._stop_nonfinite, self._log_every = stop_nonfinite, log_every
        with alone() as self._leads:
            self._log = MetricsLog(folder, start, tensorboard) if self._leads else None
            self._losses = RowLosses(folder, start) if self._leads else None
            self._progress = Progress("train", steps, "step", start) if self._leads else None
        self._last_step, self._last_time = start, time.monotonic()
        self.waited = 0.0
        self.pending: tuple[int, Metrics] | None = None
        self.saving = self.stopping = False

    def introduce(self, model: ModelShape, mesh: Any, feed: Feed, optimizer: Optimizer) -> None:
        sizes = " × ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
        say(
            f"{model.parameters / 1e6:.1f}M parameters, {self._flops / 1e9:.3f} GFLOP/token, "
            f"peak rate {optimizer.peak_rate(self._tokens):.3g}"
        )
        say(
            f"mesh {sizes} on {mesh.size} × {jax.devices()[0].device_kind}; "
            f"{self._tokens} tokens a step, accumulated {feed.accumulation} times"
        )
        if peak_flops():
            say(MFU_FORMULA)

    def finish_last(self, writer: Writer) -> None:
        """Reads the metrics of the step before the one in flight, and acts on them."""
        if self.pending is None:
            return
        step, metrics = self.pending
        self.pending = None
        metrics = jax.device_get(metrics)
        if not metrics.finite and self._stop_nonfinite:
            writer.wait()
            # One of this very step may hold what the loss came from.
            good = [saved for saved in committed_steps(writer.folder) if saved < step]
            raise UserError(
                f"step {step}: loss {metrics.loss} and gradient norm {metrics.gradient_norm} are "
                f"not finite; the last checkpoint that finite steps went on from is "
                f"{writer.folder / str(good[0]) if good else 'none'}; a lower "
                f"Optimizer.learning_rate, or train.skip_nonfinite=True, may go on from there"
            )
        self.saving |= bool(metrics.requests[0])
        self.stopping |= bool(metrics.requests[1])
        with alone() as leads:
            if leads:
                self._losses.add(step, metrics.row_ids, metrics.row_nats, metrics.row_targets)
                self._progress.update(1, loss=f"{metrics.loss:.3f}")
                if (step + 1) % self._log_every == 0 or step + 1 == self._steps:
                    self._log_step(step, metrics)

    def flush(self, end: int) -> None:
        """Writes what was found out of the steps before `end`."""
        with alone() as leads:
            if leads:
                self._losses.flush(end)
                self._log.flush()

    def _log_step(self, step: int, metrics: Metrics) -> None:
        now = time.monotonic()
        elapsed = now - self._last_time
        speed = (step + 1 - self._last_step) * self._tokens / elapsed
        figures = {
            "loss": float(metrics.loss),
            "learning_rate": float(metrics.learning_rate),
            "gradient_norm": float(metrics.gradient_norm),
            "tokens_per_second": round(speed, 1),
            "data_wait_share": round(self.waited / elapsed, 4),
        }
        if peak := peak_flops():
            figures["mfu"] = round(speed * self._flops / peak, 4)
        if metrics.skipped:
            figures["skipped_steps"] = int(metrics.skipped)
        self._log.log(step, **figures)
        self._last_step, self._last_time, self.waited = step + 1, now, 0.0

    def log_held_out(self, step: int, found: HeldOut, seconds: float) -> None:
        """Takes a held-out loss; the seconds that it took are not those of the steps."""
        self._last_time += seconds
        figures, rows = found.figures(self._rows), self._rows.rows("held_out")
        scored, names = len(found.row_ids), ("nats_per_token", "bits_per_byte")
        part = f" (estimated from {scored:,} of {rows:,} rows)" if scored < rows else ""
        with alone() as leads:
            if leads:
                self._log.log(step, **{f"held_out_{name}": figures[name] for name in names})
                self._progress.say(
                    f"step {step + 1}: held-out {figures['bits_per_byte']:.4f} bits per byte, "
                    f"{figures['nats_per_token']:.4f} nats per token{part}"
                )

    def __enter__(self) -> "Watch":
        return self

    def __exit__(self, *_: Any) -> None:
        if self._leads:
            self._progress.close()
            self._log.close()


class Signals:
    """Remembers SIGTERM and the first ^C, so that the run saves and leaves; a second ^C kills."""

    def __init__(self):
        self.received = False

    def __enter__(self) -> "Signals":
        self._before = {
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
        if steps is not None and (len(steps) != 2 or not 0 <= steps[0] <= steps[1]):
            raise UserError(f"train.profile_steps is {steps}, expected [first, last], from 0")
        self._first, self._last = steps or (math.inf, math.inf)
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
