"""From the rows that a process reads to arrays that lie on the mesh.

Axes: a accumulation, c sequences taken at once by the devices of this process, t position.
"""

import jax
import numpy as np
from jax.sharding import NamedSharding

from pangu_tiny.program.batch import Batch, BatchLayout


class Feed:
    """Knows which positions of a batch this process serves, and lays them out on its devices.

    Attributes:
      layout: of a batch.
      positions: int array, the positions inside a batch that this process has to read.
    """

    def __init__(self, layout: BatchLayout):
        self.layout = layout
        self._shardings, self._devices = layout.shardings, layout.mesh.size
        self._shape = (layout.accumulation, layout.rows_at_once)
        indices = self._shardings.row_ids_ab.addressable_devices_indices_map(self._shape)
        columns = [np.arange(layout.rows_at_once)[index[1]] for index in indices.values()]
        self._columns = np.unique(np.concatenate(columns))
        starts = np.arange(layout.accumulation)[:, None] * layout.rows_at_once
        self.positions = (starts + self._columns).reshape(-1)

    def place(
        self, local: dict[str, np.ndarray], saves: bool = False, stops: bool = False
    ) -> Batch:
        """Rows and row ids at `positions`, and what this process asks for, as a Batch."""
        shape = (self.layout.accumulation, len(self._columns))
        rows_act = local["rows"].reshape(*shape, -1)
        row_ids_ac = local["row_ids"].astype(np.int32).reshape(shape)
        requests = np.broadcast_to([saves, stops], (self._devices, 2))
        return Batch(
            self._assemble(rows_act, self._shardings.rows_abt),
            self._assemble(row_ids_ac, self._shardings.row_ids_ab),
            jax.make_array_from_callback(
                requests.shape, self._shardings.requests, lambda index: requests[index]
            ),
        )

    def _assemble(self, local: np.ndarray, sharding: NamedSharding) -> jax.Array:
        def part(index: tuple[slice, ...]) -> np.ndarray:
            columns = np.arange(self.layout.rows_at_once)[index[1]]
            return local[:, np.searchsorted(self._columns, columns)]

        return jax.make_array_from_callback((*self._shape, *local.shape[2:]), sharding, part)
