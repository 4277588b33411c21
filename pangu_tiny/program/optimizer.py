"""AdamW, its schedule, and which parameters decay."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from pangu_tiny.errors import UserError, check_number

_DECAYED = {"table", "query", "key", "value", "out", "down", "up", "gate", "kernel"}
_NOT_DECAYED = {"scale", "series_scale", "series_bias"}


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """AdamW with linear warm-up and a cosine; defaults are those of the paper's released config.

    Attributes:
      learning_rate: the peak; None takes the paper's rule,
        (batch tokens / base_batch_tokens) ** rate_exponent · base_rate (P1, optimisation).
      base_rate, base_batch_tokens, rate_exponent: lr₀, batch₀ and r of that rule.
      warmup_fraction: share of the steps over which the rate rises linearly to its peak.
      final_fraction: rate of the last step, as a share of the peak.
      b1, b2, eps: of Adam.
      weight_decay: decoupled, for matrices only, see `decay_mask`.
      clip: largest global norm of a gradient.
      skip_nonfinite: leave out the update of a step whose loss or gradient is not finite, and
        count it, instead of stopping.
    """

    learning_rate: float | None = None
    base_rate: float = 1e-4
    base_batch_tokens: int = 2**20
    rate_exponent: float = 0.5
    warmup_fraction: float = 0.03
    final_fraction: float = 0.1
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip: float = 1.0
    skip_nonfinite: bool = False

    def __post_init__(self):
        for name in ("warmup_fraction", "final_fraction"):
            check_number(f"Optimizer.{name}", getattr(self, name), 0, 1)
        check_number("Optimizer.clip", self.clip, above=0)

    def identity(self) -> dict[str, Any]:
        """What decides the steps of a run."""
        return {name: x for name, x in vars(self).items() if name != "skip_nonfinite"}

    def peak_rate(self, batch_tokens: int) -> float:
        """The highest learning rate of a run with this many tokens a step."""
        if self.learning_rate is not None:
            return self.learning_rate
        return (batch_tokens / self.base_batch_tokens) ** self.rate_exponent * self.base_rate

    def schedule(self, steps: int, batch_tokens: int, start: int = 0) -> optax.Schedule:
        """The rate of each step of a run that begins at step `start` of `steps`, the last of which
        has final_fraction of the peak."""
        peak = self.peak_rate(batch_tokens)
        warmup = max(1, round(self.warmup_fraction * steps))

        def rate(step: jax.Array) -> jax.Array:
            done = start + step + 1
            rising = done / warmup
            progress = jnp.clip((done - warmup) / max(1, steps - warmup), 0.0, 1.0)
            cosine = 0.5 * (1 + jnp.cos(jnp.pi * progress))
            falling = self.final_fraction + (1 - self.final_fraction) * cosine
            return peak * jnp.minimum(rising, falling)

        return rate

    def transformation(self, schedule: optax.Schedule) -> optax.GradientTransformation:
        return optax.chain(
            optax.clip_by_global_norm(self.clip),
            optax.scale_by_adam(self.b1, self.b2, self.eps),
            optax.add_decayed_weights(self.weight_decay, decay_mask),
            optax.scale_by_learning_rate(schedule),
        )


@dataclasses.dataclass(frozen=True)
class SharedSchedule:
    """A schedule of the learning rate that several runs share, one after the other.

    Attributes:
      start: the first step of this run within it.
      steps: its length; None ends it with this run.
    """

    start: int = 0
    steps: int | None = None

    def __post_init__(self):
        check_number("SharedSchedule.start", self.start, 0)

    def within(self, steps: int) -> tuple[int, int]:
        """Start and length of the schedule of a run of `steps`."""
        length = self.start + steps if self.steps is None else self.steps
        if self.start + steps > length:
            raise UserError(
                f"SharedSchedule.start {self.start} and train.steps {steps} go beyond "
                f"SharedSchedule.steps {length}"
            )
        return self.start, length


OWN_SCHEDULE = SharedSchedule()
"""That of a run which shares it with no other."""


def decay_mask(params: dict[str, Any]) -> dict[str, Any]:
    """True for the matrices (embedding, head, attention, FFN, shortcut), False for norms and for
    the scales and biases of the series activation. By leaf name: the rank of a stacked leaf says
    nothing.

    Raises:
      ValueError: a leaf whose name is in neither list.
    """

    def decays(path: tuple[Any, ...], _: Any) -> bool:
        name = path[-1].key
        if name not in _DECAYED | _NOT_DECAYED:
            raise ValueError(f"no rule says whether {jax.tree_util.keystr(path)} decays")
        return name in _DECAYED

    return jax.tree_util.tree_map_with_path(decays, params)
