"""What is compiled for a model on a mesh, from sizes, marks and hardware alone.

No folder is needed, and no device: `devices` may be those of a topology that is not there, for
which the functions can be compiled all the same.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from pangu_tiny.data.rows import Marks
from pangu_tiny.model.decoder import Decoder, parameter_shapes
from pangu_tiny.model.layout import check_divides, param_shardings
from pangu_tiny.model.shape import ModelShape
from pangu_tiny.program.batch import BatchLayout
from pangu_tiny.program.optimizer import OWN_SCHEDULE, Optimizer, SharedSchedule
from pangu_tiny.program.step import Objective, TrainState, abstract_state, score_step, train_step
from pangu_tiny.topology.compiler import keep_compiled
from pangu_tiny.topology.hardware import Hardware
from pangu_tiny.topology.mesh import make_mesh

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
"""Of matrix products and activations."""


@dataclasses.dataclass(frozen=True)
class Program:
    """A model on a mesh, and how its loss is computed."""

    mesh: Mesh
    hardware: Hardware
    objective: Objective

    @property
    def shape(self) -> ModelShape:
        return self.objective.decoder.shape

    def resized(self, shape: ModelShape) -> "Program":
        """The same for another shape."""
        decoder = self.objective.decoder.clone(shape=shape)
        return dataclasses.replace(self, objective=self.objective._replace(decoder=decoder))

    @property
    def param_shardings(self) -> dict[str, Any]:
        return param_shardings(self.shape, self.mesh)

    @property
    def params(self) -> dict[str, Any]:
        """Shape, dtype and layout of every parameter."""
        return jax.tree.map(
            lambda leaf, layout: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=layout),
            parameter_shapes(self.shape),
            self.param_shardings,
        )

    @functools.cached_property
    def score(self) -> Callable[..., tuple[jax.Array, jax.Array]]:
        """See `score_step`."""
        return score_step(self.objective, self.mesh)


class Training(NamedTuple):
    """What trains a model.

    Attributes:
      layout: of a batch.
      optimizer: the transformation of gradients.
      state: shape, dtype and layout of every leaf.
      step: what `train_step` makes, a compiled function.
    """

    layout: BatchLayout
    optimizer: optax.GradientTransformation
    state: TrainState
    step: Any


def build(
    shape: ModelShape,
    hardware: Hardware,
    marks: Marks,
    dtype: str,
    z_loss: float = 0.0,
    devices: Sequence[jax.Device] | None = None,
) -> Program:
    """Lays a model on a mesh.

    Args:
      dtype: one of `DTYPES`.
      devices: None takes all that JAX finds.
    """
    if devices is None:
        hardware.check_devices(jax.devices())
        if hardware.compilation_cache:
            keep_compiled(hardware.compilation_cache)
    mesh = make_mesh(hardware.data, hardware.fsdp, hardware.tensor, devices)
    decoder = Decoder(shape, DTYPES[dtype], hardware.attention, hardware.remat, hardware.unroll)
    check_divides(shape, mesh)
    return Program(mesh, hardware, Objective(decoder, *marks, hardware.loss_chunk, z_loss))


def build_training(
    program: Program,
    optimizer: Optimizer,
    steps: int,
    global_batch: int,
    sequence_length: int,
    shared_schedule: SharedSchedule = OWN_SCHEDULE,
) -> Training:
    """What trains the model of a program.

    Args:
      steps: of the run.
      global_batch: sequences a step, over all devices.
      shared_schedule: where other runs share the schedule of the learning rate.
    """
    mesh = program.mesh
    layout = BatchLayout.of(mesh, global_batch, program.hardware.per_device_batch)
    start, length = shared_schedule.within(steps)
    schedule = optimizer.schedule(length, global_batch * sequence_length, start)
    transformation = optimizer.transformation(schedule)
    return Training(
        layout,
        transformation,
        abstract_state(program.objective.decoder, transformation, mesh),
        train_step(program.objective, transformation, schedule, layout, optimizer.skip_nonfinite),
    )
