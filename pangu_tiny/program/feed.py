"""From the rows that a process reads to arrays that lie on the mesh."""

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from pangu_tiny.errors import UserError
from pangu_tiny.program.step import Batch, batch_shardings
from pangu_tiny.topology.mesh import batch_shards


class Feed:
    """Knows which positions of a batch this process serves, and lays them out.

    A batch [accumulation, rows taken at once] is cut along its second axis; position p of the
    batch is (p // rows, p % rows) on every mesh, so that every mesh sees the same batches.

    Args:
      binding: what set `global_batch`, for messages.

    Attributes:
      accumulation: how many times `rows_at_once` make a batch.
      positions: int array, the positions inside a batch that this process has to read.

    Raises:
      UserError: the batch does not divide over the mesh.
    """

    def __init__(
        self,
        mesh: Mesh,
        global_batch: int,
        per_device_batch: int,
        binding: str = "train.global_batch",
    ):
        shards = batch_shards(mesh)
        if global_batch < 1 or global_batch % shards:
            raise UserError(
                f"{binding} {global_batch} is not divisible by Hardware.data × fsdp = "
                f"{shards}, the devices that share a batch"
            )
        share = global_batch // shards
        per_device = max(n for n in range(1, per_device_batch + 1) if share % n == 0)
        self.accumulation = share // per_device
        self.rows_at_once = per_device * shards
        self._shardings = batch_shardings(mesh)
        self._devices = mesh.size
        indices = self._shardings.row_ids_ab.addressable_devices_indices_map(
            (self.accumulation, self.rows_at_once)
        )
        columns = [np.arange(self.rows_at_once)[index[1]] for index in indices.values()]
        self._columns = np.unique(np.concatenate(columns))
        starts = np.arange(self.accumulation)[:, None] * self.rows_at_once
        self.positions = (starts + self._columns).reshape(-1)

    def place(self, local: dict[str, np.ndarray], requests: np.ndarray) -> Batch:
        """Rows and row ids at `positions`, and what this process asks for, as a Batch."""
        shape = (self.accumulation, len(self._columns))
        rows_act = local["rows"].reshape(*shape, -1)
        row_ids_ac = local["row_ids"].astype(np.int32).reshape(shape)
        return Batch(
            self._assemble(rows_act, self._shardings.rows_abt),
            self._assemble(row_ids_ac, self._shardings.row_ids_ab),
            jax.make_array_from_callback(
                (self._devices, len(requests)),
                self._shardings.requests,
                lambda index: np.broadcast_to(requests, (self._devices, len(requests)))[index],
            ),
        )

    def _assemble(self, local: np.ndarray, sharding: NamedSharding) -> jax.Array:
        shape = (self.accumulation, self.rows_at_once, *local.shape[2:])

        def part(index: tuple[slice, ...]) -> np.ndarray:
            columns = np.arange(self.rows_at_once)[index[1]]
            return local[:, np.searchsorted(self._columns, columns)]

        return jax.make_array_from_callback(shape, sharding, part)


def most_scored_at_once(mesh: Mesh, per_device_batch: int) -> int:
    """Rows over all devices: four times what training takes, since nothing is kept for a backward
    pass."""
    return 4 * per_device_batch * batch_shards(mesh)
