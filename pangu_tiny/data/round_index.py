"""A round index: the units that a round goes through, as select-batches drew them.

A folder of select-batches holds

    round_index.npz   units: int64, in the order in which they are served
                      about: JSON: the round that they were drawn from, the unit, and how
    report.html       what was taken and what was left, as pictures
"""

import dataclasses
from typing import Any

import numpy as np
from etils import epath

from pangu_tiny.arrays import read_described, write_arrays
from pangu_tiny.data.order import Round
from pangu_tiny.errors import UserError, failing_as
from pangu_tiny.workdir import digest_of, finished

INDEX = "round_index.npz"


@dataclasses.dataclass(frozen=True, eq=False)
class RoundIndex:
    """What a later round trains on.

    Attributes:
      round, unit: what the numbers mean.
      model: digest of the checkpoint by whose losses they were drawn.
      units: int64, as they are served; select-batches names none twice.
      how: settings and digests that they follow from.
    """

    round: Round
    unit: str
    model: str
    units: np.ndarray
    how: dict[str, Any]

    @classmethod
    def open(cls, folder: str) -> "RoundIndex":
        """Reads a workdir of select-batches."""
        path = finished("round index", folder, "select-batches", INDEX)
        about, arrays = read_described(path)
        with failing_as(f"{path} is not what select-batches writes", TypeError, KeyError):
            index = cls(**about | {"round": Round(**about["round"])} | arrays)
            index._check(path)
        return index

    def write(self, folder: epath.Path) -> None:
        facts = {name: value for name, value in vars(self).items() if name != "units"}
        write_arrays(folder / INDEX, {"units": self.units}, facts | {"round": vars(self.round)})

    @property
    def rows(self) -> int:
        """How many rows a unit has."""
        return self.round.rows(self.unit)

    @property
    def batches(self) -> int:
        """How many batches the units make."""
        return len(self.units) * self.rows // self.round.global_batch

    @property
    def identity(self) -> dict[str, Any]:
        """JSON values: what they are drawn from, and a digest of the numbers themselves."""
        return {
            "digest": digest_of(self.how, self.units.astype(np.int64, copy=False)),
            "unit": self.unit,
            "round": vars(self.round),
        }

    def _check(self, path: epath.Path) -> None:
        units, total = self.units, self.round.units(self.unit)
        if units.ndim != 1 or units.dtype.kind not in "iu" or not units.size:
            raise UserError(
                f"{path} holds {units.dtype}{list(units.shape)}, expected int64 [units]"
            )
        if units.min() < 0 or units.max() >= total:
            worst = units.max() if units.max() >= total else units.min()
            raise UserError(
                f"{path} names {self.unit} {worst}, its round has {self.unit} 0 to {total - 1}"
            )
        if len(units) * self.rows % self.round.global_batch:
            raise UserError(
                f"{path} holds {len(units)} sequences, expected whole batches of "
                f"{self.round.global_batch}"
            )
