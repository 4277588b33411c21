"""One training step and one scoring step, compiled for a mesh.

Axes: a accumulation, b sequences taken at once over all devices, t position.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from pangu_tiny.data.rows import Marked, read_marks
from pangu_tiny.model.decoder import Decoder, head_kernel, init_params, parameter_shapes
from pangu_tiny.model.layout import param_shardings
from pangu_tiny.program.batch import Batch, BatchLayout
from pangu_tiny.program.loss import Loss, cross_entropy
from pangu_tiny.topology.compiler import compiler_options
from pangu_tiny.topology.mesh import named_sharding
from pangu_tiny.topology.reduction import sum_over_replicas


class TrainState(NamedTuple):
    """Everything that a step changes. `step` counts steps taken, `skipped` those among them whose
    update was left out because loss or gradient was not finite (both int32 scalars). Arrays, their
    shapes, or their layouts."""

    params: dict[str, Any]
    optimizer: optax.OptState
    step: Any
    skipped: Any


class Metrics(NamedTuple):
    """loss: nats per target. learning_rate: of this step. row_*: of every row of the batch, flat,
    in the same order."""

    loss: jax.Array
    learning_rate: jax.Array
    gradient_norm: jax.Array
    finite: jax.Array
    skipped: jax.Array
    row_ids: jax.Array
    row_nats: jax.Array
    row_targets: jax.Array
    requests: jax.Array


class Objective(NamedTuple):
    """What is minimised: the model, the marks of the rows, and how the loss is computed."""

    decoder: Decoder
    begin_id: int
    end_id: int
    loss_chunk: int
    z_loss: float = 0.0

    def __call__(self, params: dict[str, Any], rows_bt: jax.Array) -> tuple[Loss, Marked]:
        marked = read_marks(rows_bt, self.begin_id, self.end_id)
        hidden_btd: Any = self.decoder.apply(
            {"params": params}, marked.inputs, marked.segments, marked.positions
        )
        loss = cross_entropy(
            hidden_btd,
            head_kernel(params),
            marked.targets,
            marked.weights,
            vocab_size=self.decoder.shape.vocab_size,
            chunk=self.loss_chunk,
            z_loss=self.z_loss,
        )
        return loss, marked


def abstract_state(decoder: Decoder, transformation: Any, mesh: Mesh) -> TrainState:
    """Shape, dtype and layout of every leaf: optimizer moments lie as their parameters do."""
    params = parameter_shapes(decoder.shape)
    layouts = param_shardings(decoder.shape, mesh)
    whole = named_sharding(mesh, ())
    moments = jax.eval_shape(transformation.init, params)
    moment_layouts = optax.tree.map_params(
        transformation,
        lambda _, layout: layout,
        moments,
        layouts,
        transform_non_params=lambda _: whole,
    )
    count = jax.ShapeDtypeStruct((), jnp.int32)
    return jax.tree.map(
        lambda leaf, layout: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=layout),
        TrainState(params, moments, count, count),
        TrainState(layouts, moment_layouts, whole, whole),
    )


def state_shardings(decoder: Decoder, transformation: Any, mesh: Mesh) -> TrainState:
    """The layout of every leaf."""
    return jax.tree.map(lambda leaf: leaf.sharding, abstract_state(decoder, transformation, mesh))


def init_state(
    decoder: Decoder,
    transformation: Any,
    scheme: str,
    seed: int,
    mesh: Mesh,
    params: dict[str, Any] | None = None,
) -> TrainState:
    """A fresh state, in its layout: with `params`, or with random parameters that are drawn on
    the devices, the same numbers on every mesh."""

    def create(key: Any, params: dict[str, Any] | None) -> TrainState:
        if params is None:
            params = init_params(decoder.shape, scheme, jax.random.wrap_key_data(key))
        zero = jnp.zeros((), jnp.int32)
        return TrainState(params, transformation.init(params), zero, zero)

    # Random numbers make much code that runs once: on a CPU, half of the time to compile is saved.
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    options = {"xla_backend_optimization_level": 1} if on_cpu else None
    shardings = state_shardings(decoder, transformation, mesh)
    with jax.set_mesh(mesh):
        create = jax.jit(create, out_shardings=shardings, compiler_options=options)
        return create(np.asarray(jax.random.key_data(jax.random.key(seed))), params)


def train_step(
    objective: Objective,
    transformation: Any,
    schedule: optax.Schedule,
    layout: BatchLayout,
    skip_nonfinite: bool = False,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """The compiled step; it consumes the state that it is given.

    The gradient is that of the mean over all targets of the global batch, however many devices
    and accumulation steps share them.
    """

    def scaled_loss(params, rows_bt, targets):
        loss, marked = objective(params, rows_bt)
        return loss.total / targets, (loss.rows_b, jnp.sum(marked.weights, axis=-1))

    value_and_grad = jax.value_and_grad(scaled_loss, has_aux=True)

    def gradient_and_rows(rows_abt, params, targets):
        if rows_abt.shape[0] == 1:
            (_, rows), gradient = value_and_grad(params, rows_abt[0], targets)
            return gradient, jax.tree.map(lambda row_b: row_b[None], rows)

        def accumulate(total, rows_bt):
            (_, rows), gradient = value_and_grad(params, rows_bt, targets)
            return jax.tree.map(jnp.add, total, gradient), rows

        return jax.lax.scan(accumulate, jax.tree.map(jnp.zeros_like, params), rows_abt)

    gradient_and_rows = sum_over_replicas(gradient_and_rows, layout.mesh)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        marks = jax.vmap(lambda rows: read_marks(rows, objective.begin_id, objective.end_id))
        targets = jnp.maximum(1.0, jnp.sum(marks(batch.rows_abt).weights))
        gradient, rows = gradient_and_rows(batch.rows_abt, state.params, targets)
        row_nats, row_targets = (part.reshape(-1) for part in rows)
        loss = jnp.sum(row_nats) / targets
        norm = optax.tree.norm(gradient)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        updates, optimizer = transformation.update(gradient, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        if skip_nonfinite:
            params, optimizer = jax.tree.map(
                lambda new, old: jnp.where(finite, new, old),
                (params, optimizer),
                (state.params, state.optimizer),
            )
        skipped = state.skipped + (~finite if skip_nonfinite else 0)
        metrics = Metrics(
            loss=loss,
            learning_rate=schedule(state.step - state.skipped),  # as the optimizer counts
            gradient_norm=norm,
            finite=finite,
            skipped=skipped,
            row_ids=batch.row_ids_ab.reshape(-1),
            row_nats=row_nats,
            row_targets=row_targets,
            requests=jnp.any(batch.requests, axis=0),
        )
        return TrainState(params, optimizer, state.step + 1, skipped), metrics

    shardings = state_shardings(objective.decoder, transformation, layout.mesh)
    return jax.jit(
        step,
        in_shardings=(shardings, layout.shardings),
        out_shardings=(shardings, named_sharding(layout.mesh, ())),
        donate_argnums=0,
        compiler_options=compiler_options(layout.mesh),
    )


def score_step(
    objective: Objective, mesh: Mesh
) -> Callable[[dict[str, Any], jax.Array], tuple[jax.Array, jax.Array]]:
    """Forward only: parameters and rows [b, t + 1] to the nats and the targets of every row."""

    def step(params: dict[str, Any], rows_bt: jax.Array) -> tuple[jax.Array, jax.Array]:
        loss, marked = objective(params, rows_bt)
        return loss.rows_b, jnp.sum(marked.weights, axis=-1)

    whole, options = named_sharding(mesh, ()), compiler_options(mesh)
    return jax.jit(step, out_shardings=whole, compiler_options=options)
