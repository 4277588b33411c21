"""The held-out loss: of every row, or of rows that stand for all, and in bits per byte."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from pangu_tiny.data.dataset import TokenDataset
from pangu_tiny.data.loader import held_out_batches
from pangu_tiny.program.batch import BatchLayout, most_scored_at_once
from pangu_tiny.program.build import Program
from pangu_tiny.program.feed import Feed
from pangu_tiny.topology.mesh import batch_shards
from pangu_tiny.training.metrics import bits_per_byte


class HeldOut(NamedTuple):
    """The losses of held-out rows.

    Attributes:
      row_ids: int64 [n].
      nats: float64 [n], the sum of the losses of a row.
      targets: int64 [n], how many losses that are.
    """

    row_ids: np.ndarray
    nats: np.ndarray
    targets: np.ndarray

    def figures(self, dataset: TokenDataset, source: str | None = None) -> dict[str, Any]:
        """`targets` that were scored, `nats_per_token` and `bits_per_byte`, of one source or of
        all; empty where none was scored.

        Bits per byte are nats over all targets / ln 2 / raw UTF-8 bytes. Where rows were left out,
        they are an estimate: rows begin and end inside of documents, so that the bytes of some of
        them are not known, and nats per token are multiplied by tokens per byte of all.
        """
        counts, mine = dataset.description["splits"]["held_out"], slice(None)
        if source is not None:
            counts = counts["sources"][source]
            mine = dataset.source_ids("held_out", self.row_ids) == dataset.sources.index(source)
        nats, targets = float(self.nats[mine].sum()), int(self.targets[mine].sum())
        if not targets:
            return {}
        all_nats = nats * (counts["targets"] / targets)
        return {
            "targets": targets,
            "nats_per_token": nats / targets,
            "bits_per_byte": bits_per_byte(all_nats, counts["bytes"]),
        }


def score_held_out(
    program: Program,
    params: dict[str, Any],
    dataset: TokenDataset,
    rows: int | None = None,
    came_back: Callable[[int], Any] | None = None,
) -> HeldOut:
    """Scores rows of the held-out split, each once.

    The losses stay on the devices until all are there. A row's is a float32 sum (1e-6 of it);
    adding up is done in float64.

    Args:
      rows: how many; None is all. Fewer than all are the same ones each time, spread evenly over
        the split, so that every source and shard has its share of them to within one row.
      came_back: called for each batch with the number of its rows.
    """
    row_ids = _spread(dataset.count("held_out"), rows)
    if not row_ids.size:
        return HeldOut(row_ids, np.zeros(0), row_ids)
    # As few batches as can be, and no larger than that many have to be.
    shards = batch_shards(program.mesh)
    most = most_scored_at_once(program.mesh, program.hardware.per_device_batch)
    count = -(-len(row_ids) // most)
    at_once = shards * -(-len(row_ids) // (count * shards))
    feed = Feed(BatchLayout(program.mesh, 1, at_once))
    scored: list[tuple[jax.Array, jax.Array]] = []
    for local in held_out_batches(dataset, at_once, feed.positions, row_ids):
        scored.append(program.score(params, feed.place(local).rows_abt[0]))
        # Waits for the batch before the one in flight, so that no more than two are on the devices.
        jax.block_until_ready(scored[-2:-1])
        if came_back:
            came_back(min(at_once, len(row_ids) - at_once * (len(scored) - 1)))
    nats, targets = (
        np.concatenate(parts, dtype=np.float64)[: len(row_ids)]
        for parts in zip(*jax.device_get(scored), strict=True)
    )
    return HeldOut(row_ids, nats, targets.astype(np.int64))


def _spread(total: int, count: int | None) -> np.ndarray:
    """So many of the numbers from 0 to below `total`, ascending, in steps that differ by 1 at
    most."""
    count = total if count is None else min(count, total)
    return np.arange(count) * total // max(1, count)
