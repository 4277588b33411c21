"""A batch of rows: what a step takes, and how that lies on a mesh, whose devices need not be there.

Axes: a accumulation, b sequences taken at once over all devices, t position.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from pangu_tiny.errors import UserError
from pangu_tiny.topology.mesh import AXES, batch_shards, named_sharding


class Batch(NamedTuple):
    """rows_abt: int32 ids, sequence_length + 1 each. row_ids_ab: int32. requests: bool
    [devices, 2], what each process asks of all: a checkpoint, a stop. Arrays, their shapes, or
    their layouts."""

    rows_abt: Any
    row_ids_ab: Any
    requests: Any


@dataclasses.dataclass(frozen=True)
class BatchLayout:
    """How the rows of a batch are shared out: in [accumulation, rows_at_once], cut along the second
    axis. Position p of the batch is (p // rows_at_once, p % rows_at_once) on every mesh, so that
    every mesh sees the same batches."""

    mesh: Mesh
    accumulation: int
    rows_at_once: int

    @classmethod
    def of(
        cls,
        mesh: Mesh,
        global_batch: int,
        per_device_batch: int,
        binding: str = "train.global_batch",
    ) -> "BatchLayout":
        """As few steps of accumulation as `per_device_batch` allows.

        Args:
          binding: what set `global_batch`, for messages.
        """
        shards = batch_shards(mesh)
        if global_batch < 1 or global_batch % shards:
            raise UserError(
                f"{binding} {global_batch} is not divisible by Hardware.data × fsdp = "
                f"{shards}, the devices that share a batch"
            )
        share = global_batch // shards
        per_device = max(n for n in range(1, per_device_batch + 1) if share % n == 0)
        return cls(mesh, share // per_device, per_device * shards)

    @property
    def rows(self) -> int:
        return self.accumulation * self.rows_at_once

    @property
    def shardings(self) -> Batch:
        """Rows are cut over data and fsdp; every device has its own line of requests."""
        requests = jax.sharding.NamedSharding(self.mesh, jax.sharding.PartitionSpec(AXES))
        return Batch(
            named_sharding(self.mesh, (None, "batch", None)),
            named_sharding(self.mesh, (None, "batch")),
            requests,
        )

    def abstract(self, sequence_length: int) -> Batch:
        """Shape, dtype and layout of a batch."""
        shape = (self.accumulation, self.rows_at_once)
        sizes = Batch(
            jax.ShapeDtypeStruct((*shape, sequence_length + 1), jnp.int32),
            jax.ShapeDtypeStruct(shape, jnp.int32),
            jax.ShapeDtypeStruct((self.mesh.size, 2), bool),
        )
        return jax.tree.map(
            lambda size, sharding: jax.ShapeDtypeStruct(size.shape, size.dtype, sharding=sharding),
            sizes,
            self.shardings,
        )

    def abstract_rows(self, sequence_length: int) -> jax.ShapeDtypeStruct:
        """Those of the rows that are taken at once, as a scoring step takes them."""
        size, layout = (self.rows_at_once, sequence_length + 1), ("batch", None)
        return jax.ShapeDtypeStruct(size, jnp.int32, sharding=named_sharding(self.mesh, layout))


def most_scored_at_once(mesh: Mesh, per_device_batch: int) -> int:
    """Rows over all devices: four times what training takes, since nothing is kept for a backward
    pass."""
    return 4 * per_device_batch * batch_shards(mesh)
