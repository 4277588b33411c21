"""Learned importance: 0/1 masks on a frozen teacher, trained on the language-model loss.

Every structure has a logit s. In each step the teacher runs with the k structures of each kind
whose s + noise is largest, so that the shape that is run is exact at every step, and no penalty has
to drive it there. Backwards, the mask is taken for σ((s + noise − ν) / τ), with ν such that these
add up to k (straight-through), ν's own gradient included: to favour one structure is to disfavour
the others.

Schedules, none of them stated in the paper: chosen and to be set in `MaskTraining`. The noise is
logistic, as in a Gumbel sigmoid, and falls with the temperature τ, geometrically; k comes down from
all to the target linearly over the first part of the steps, since a model that is cut at once has
no gradient that means much.

Axes: l layer, d width, n groups of query heads, g heads of one, f neurons, r bottleneck.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from pangu_tiny.errors import UserError, check_number, check_one_of
from pangu_tiny.inherit.measure import mean_loss
from pangu_tiny.inherit.structures import apply_masks, masked_shape
from pangu_tiny.model.shape import ModelShape
from pangu_tiny.program.build import Program
from pangu_tiny.program.step import Objective
from pangu_tiny.topology.compiler import compiler_options
from pangu_tiny.topology.mesh import named_sharding

START = ("zero", "taylor")


@dataclasses.dataclass(frozen=True)
class MaskTraining:
    """How learned masks are trained; nothing of it is stated in the paper.

    Attributes:
      steps: of Adam on the logits, one batch each.
      learning_rate: its rate, falling linearly to 0.
      first_temperature, last_temperature: τ.
      shrink_fraction: share of the steps over which the kept number comes down to the target.
      noise: factor of the logistic noise, beside τ.
      start: "zero", or "taylor": logits that rank as first-order importance does, from −1 to 1.
      save_every: steps between saved states, from which an interrupted training resumes.
    """

    steps: int = 300
    learning_rate: float = 0.05
    first_temperature: float = 1.0
    last_temperature: float = 0.1
    shrink_fraction: float = 0.5
    noise: float = 0.5
    start: str = "taylor"
    save_every: int = 20

    def __post_init__(self):
        for name in ("steps", "save_every"):
            check_number(f"MaskTraining.{name}", getattr(self, name), 1)
        for name in ("learning_rate", "noise"):
            check_number(f"MaskTraining.{name}", getattr(self, name), 0, below=math.inf)
        if not 0 < self.last_temperature <= self.first_temperature:
            raise UserError(
                f"MaskTraining.first_temperature {self.first_temperature} and last_temperature "
                f"{self.last_temperature}: expected positive numbers, the last not above the first"
            )
        check_number("MaskTraining.shrink_fraction", self.shrink_fraction, 0, 1)
        check_one_of("MaskTraining.start", self.start, START)

    def identity(self) -> dict[str, Any]:
        """What decides the result."""
        return {name: value for name, value in vars(self).items() if name != "save_every"}


class MaskState(NamedTuple):
    """logits: float32 by kind, [d] for "embed", [l, n, g] for "heads", else [l, structures]."""

    logits: dict[str, jax.Array]
    optimizer: Any
    step: jax.Array


def head_groups(teacher: ModelShape, student: ModelShape, kv: str) -> int:
    """In how many groups of neighbours query heads are chosen, equally many in each: those of one
    key-value head, of several that are merged, or all, where each gets its own."""
    return {"repeat": 1, "merge": student.kv_heads, "drop": teacher.kv_heads}[kv]


def targets(
    teacher: ModelShape, student: ModelShape, kv: str = "drop"
) -> dict[str, tuple[int, int]]:
    """How many of how many structures stay, by kind; kinds of which all stay are left out, and
    "heads" is of those in one group."""
    groups = head_groups(teacher, student, kv)
    kept_groups = student.kv_heads if kv == "drop" else groups
    counts = {
        "embed": (student.width, teacher.width),
        "kv_heads": (kept_groups, groups),
        "heads": (student.heads // kept_groups, teacher.heads // groups),
        "ffn": (student.ffn_width, teacher.ffn_width),
        "bottleneck": (student.bottleneck, teacher.bottleneck),
    }
    return {kind: count for kind, count in counts.items() if count[0] < count[1]}


def first_logits(
    shape: ModelShape, groups: int, scores: dict[str, np.ndarray] | None
) -> dict[str, np.ndarray]:
    """Zeros, or the rank of every structure of the teacher by `scores` among its peers, from −1
    to 1."""
    n, g = groups, shape.heads // groups
    sizes = {
        "embed": (shape.width,),
        "kv_heads": (shape.depth, n),
        "heads": (shape.depth, n, g),
        "ffn": (shape.depth, shape.ffn_width),
        "bottleneck": (shape.depth, shape.bottleneck),
    }
    logits = {kind: np.zeros(size, np.float32) for kind, size in sizes.items() if size[-1]}
    ranked = [kind for kind in logits if kind != "kv_heads" or n == shape.kv_heads]
    for kind in ranked if scores else ():  # groups that are no key-value heads have no score
        size = sizes[kind]
        ranks = np.argsort(np.argsort(scores[kind].reshape(size), axis=-1), axis=-1)
        logits[kind] = (2 * ranks / max(1, size[-1] - 1) - 1).astype(np.float32)
    return logits


def soft_top(scores: jax.Array, count: jax.Array, temperature: jax.Array) -> jax.Array:
    """σ((s − ν) / τ) along the last axis, with ν such that they add up to `count`."""
    scaled = scores / temperature
    ends = jnp.zeros((*scaled.shape[:-1], 1))

    def halve(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds
        middle = (low + high) / 2
        above = jnp.sum(jax.nn.sigmoid(scaled - middle), axis=-1, keepdims=True) > count
        return jnp.where(above, middle, low), jnp.where(above, high, middle)

    bounds = (ends + jnp.min(scaled) - 40, ends + jnp.max(scaled) + 40)
    shift = jax.lax.stop_gradient(sum(jax.lax.fori_loop(0, 60, halve, bounds)) / 2)
    # One step of Newton's method moves nothing, and gives ν its gradient.
    soft = jax.nn.sigmoid(scaled - shift)
    slope = jax.lax.stop_gradient(jnp.sum(soft * (1 - soft), axis=-1, keepdims=True))
    shift += (jnp.sum(soft, axis=-1, keepdims=True) - count) / jnp.maximum(slope, 1e-6)
    return jax.nn.sigmoid(scaled - shift)


def hard_top(scores: jax.Array, count: jax.Array) -> jax.Array:
    """1 for the `count` largest along the last axis, else 0; ties: the first."""
    ranks = jnp.argsort(jnp.argsort(-scores, axis=-1, stable=True), axis=-1)
    return (ranks < count).astype(jnp.float32)


def draw_masks(
    logits: dict[str, jax.Array],
    wanted: dict[str, tuple[int, int]],
    training: MaskTraining,
    step: jax.Array,
    key: jax.Array,
) -> dict[str, jax.Array]:
    """The masks of one step, as `apply_masks` takes them; straight-through."""
    progress = step / max(1, training.steps - 1)
    ratio = training.last_temperature / training.first_temperature
    temperature = training.first_temperature * ratio**progress
    shrunk = jnp.minimum(1.0, (step + 1) / max(1.0, training.shrink_fraction * training.steps))
    masks: dict[str, jax.Array] = {}
    for place, (kind, (kept, all_)) in enumerate(wanted.items()):
        if not kept:  # a shortcut that goes whole
            masks[kind] = jnp.zeros(logits[kind].shape)
            continue
        count = jnp.round(all_ - (all_ - kept) * shrunk)
        noise = jax.random.logistic(jax.random.fold_in(key, place), logits[kind].shape)
        scores = logits[kind] + training.noise * temperature * noise
        soft = soft_top(scores, count, temperature)
        masks[kind] = hard_top(scores, count) + soft - jax.lax.stop_gradient(soft)
    return as_heads(masks, logits["heads"].shape)


def as_heads(masks: dict[str, jax.Array], size_lng: tuple[int, ...]) -> dict[str, jax.Array]:
    """Masks of key-value heads and of the query heads in them as one of query heads."""
    masks = dict(masks)
    kv_ln, heads_lng = masks.pop("kv_heads", None), masks.pop("heads", None)
    if kv_ln is not None or heads_lng is not None:
        both_lng = jnp.ones(size_lng)
        if kv_ln is not None:
            both_lng *= kv_ln[..., None]
        if heads_lng is not None:
            both_lng *= heads_lng
        masks["heads"] = both_lng.reshape(size_lng[0], -1)
    return masks


def mask_step(
    objective: Objective,
    wanted: dict[str, tuple[int, int]],
    training: MaskTraining,
    mesh: Mesh,
    seed: int,
) -> tuple[
    Callable[[dict[str, np.ndarray]], MaskState],
    Callable[[MaskState, dict[str, Any], jax.Array], tuple[MaskState, jax.Array]],
]:
    """What makes the first state of some logits, and a step on rows [a, b, t + 1], which also
    gives the loss in nats per target."""
    rate = optax.linear_schedule(training.learning_rate, 0.0, training.steps)
    adam = optax.adam(rate, b1=0.9, b2=0.99)

    def init(scores: dict[str, np.ndarray]) -> MaskState:
        logits: Any = jax.tree.map(jnp.asarray, scores)
        return MaskState(logits, adam.init(logits), jnp.zeros((), jnp.int32))

    def step(
        state: MaskState, params: dict[str, Any], rows_abt: jax.Array
    ) -> tuple[MaskState, jax.Array]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)

        def masked_loss(logits: dict[str, jax.Array]) -> jax.Array:
            masks = draw_masks(logits, wanted, training, state.step, key)
            return mean_loss(objective, apply_masks(params, masks), rows_abt)

        loss, gradient = jax.value_and_grad(masked_loss)(state.logits)
        updates, optimizer = adam.update(gradient, state.optimizer)
        return MaskState(
            optax.apply_updates(state.logits, updates), optimizer, state.step + 1
        ), loss

    whole, options = named_sharding(mesh, ()), compiler_options(mesh)
    return (
        jax.jit(init, out_shardings=whole),
        jax.jit(step, out_shardings=whole, donate_argnums=0, compiler_options=options),
    )


def mask_training_step(
    program: Program, student: ModelShape, training: MaskTraining, kv: str, seed: int
) -> tuple[Callable[..., MaskState], Callable[..., tuple[MaskState, jax.Array]], int]:
    """What trains the masks of a teacher for a smaller model: see `mask_step`; and the groups of
    its query heads, see `head_groups`.

    Args:
      program: of the teacher.
    """
    masked = program.resized(masked_shape(program.shape, student.width))
    wanted = targets(program.shape, student, kv)
    init, step = mask_step(masked.objective, wanted, training, program.mesh, seed)
    return init, step, head_groups(program.shape, student, kv)


def final_scores(logits: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Logits as scores of importance, by kind, [l, structures] each; "kv_heads" by group."""
    scores = {kind: np.asarray(value, np.float64) for kind, value in logits.items()}
    layers = len(scores["heads"])
    scores["heads"] = scores["heads"].reshape(layers, -1)
    scores["embed_outside"] = scores["embed"]
    scores["embed"] = np.zeros((layers, len(scores["embed"])))
    return scores
