"""The order in which rows are served, and a round: the first batches of one.

Rows come in an endless order. Without a mixture, an epoch is a permutation of all rows of the
split, another one for each epoch, given by the dataset's digest, the seed and the epoch. With a
mixture, each source goes through its own rows in that way, and the sources take turns as evenly as
their weights allow. Without shuffling, the rows of a source come as they are stored, and without a
mixture one source comes after the other. Any place in the order can be computed on its own.
"""

import dataclasses
import hashlib
import json
import math
from typing import Any

import grain

from pangu_tiny.data.dataset import TokenDataset
from pangu_tiny.errors import UserError, check_number
from pangu_tiny.workdir import difference

UNITS = {"batch": "batches", "sequence": "sequences"}
"""What a round may be scored and drawn in, and what several are called."""


@dataclasses.dataclass(frozen=True)
class Order:
    """What decides the order of a dataset's rows.

    Attributes:
      seed: of the permutations.
      mixture: weight of each source by its name; a source that is not named is left out. The
        weights are shares of rows. None takes every row once in an epoch.
      shuffle: False takes rows as they are stored.
    """

    seed: int
    mixture: dict[str, float] | None = None
    shuffle: bool = True

    def rows(self, dataset: TokenDataset, split: str) -> grain.MapDataset:
        """The endless order: item k is the number of the row at place k."""
        if not dataset.count(split):
            raise UserError(f"dataset {dataset.path} has no rows in split {split!r}")
        key = [dataset.digest, split, self.seed]
        if self.mixture is None:
            return self._endless(0, dataset.count(split), key)
        weights = _check_mixture(dataset, split, self.mixture)
        orders = [
            self._endless(first, count, [*key, weights, source])
            for source, (first, count) in enumerate(dataset.source_rows(split))
            if weights[source]
        ]
        return grain.MapDataset.mix(orders, [weight for weight in weights if weight])

    def _endless(self, first: int, count: int, key: list[Any]) -> grain.MapDataset:
        rows = grain.MapDataset.range(first, first + count)
        if not self.shuffle:
            return rows.repeat()
        digest = hashlib.sha256(json.dumps(key).encode()).digest()
        # Grain adds the number of the epoch to this seed.
        return rows.shuffle(seed=int.from_bytes(digest[:4], "big")).repeat()


@dataclasses.dataclass(frozen=True)
class Round:
    """The batches 0 … `batches` − 1 that a run trained, of one order of one dataset.

    A unit is one of these batches, or one of their sequences; unit i is what stands at place i of
    the order, counted in units.

    Attributes:
      dataset: digest.
      seed, mixture, shuffle: of the order.
      global_batch: rows of a batch.
      batches: how many.

    Raises:
      TypeError: what was read from a file is something else.
    """

    dataset: str
    seed: int
    mixture: dict[str, float] | None
    shuffle: bool
    global_batch: int
    batches: int

    def __post_init__(self):
        for name in ("global_batch", "batches"):
            if type(getattr(self, name)) is not int or getattr(self, name) < 1:
                raise TypeError(f"{name} is {getattr(self, name)!r}")

    def rows(self, unit: str) -> int:
        """How many rows a unit has."""
        return {"batch": self.global_batch, "sequence": 1}[unit]

    def units(self, unit: str) -> int:
        """How many units there are."""
        return self.batches * self.global_batch // self.rows(unit)

    @property
    def order(self) -> Order:
        return Order(self.seed, self.mixture, self.shuffle)

    def differences(self, other: "Round") -> str:
        """What differs, as 'name is X there, Y here', here being `other`; '' where nothing does."""
        return difference(dataclasses.asdict(self), dataclasses.asdict(other))


def _check_mixture(dataset: TokenDataset, split: str, mixture: dict[str, float]) -> list[float]:
    """The weight of each source, in order."""
    rows = {
        name: count
        for name, (_, count) in zip(dataset.sources, dataset.source_rows(split), strict=True)
    }
    for name, weight in mixture.items():
        if name not in rows:
            raise UserError(f"mixture names {name!r}; the dataset has sources {dataset.sources}")
        check_number(f"mixture[{name!r}]", weight, 0, below=math.inf)
        if weight and not rows[name]:
            raise UserError(f"mixture gives {name!r} a weight, which has no rows in {split!r}")
    weights = [float(mixture.get(name, 0)) for name in dataset.sources]
    if not any(weights):
        raise UserError(f"mixture {mixture} gives every source the weight 0")
    return weights
