"""A round index: the units that a round goes through, as select-batches drew them.

A folder of select-batches holds

    round_index.npz   units: int64, in the order in which they are served
                      about: JSON: the round that they were drawn from, the unit, and how
    report.html       what was taken and what was left, as pictures
"""

import dataclasses
import hashlib
import json
from typing import Any

import numpy as np
from etils import epath

from pangu_tiny.arrays import read_described, write_arrays
from pangu_tiny.data.round import Round
from pangu_tiny.errors import UserError

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
        """Reads a workdir of select-batches.

        Raises:
          UserError: it is none, was not finished, or points outside its round.
        """
        path = epath.Path(folder) / INDEX
        if not path.exists():
            raise UserError(
                f"round index {folder} has no {INDEX}; expected a folder that select-batches "
                f"finished"
            )
        about, arrays = read_described(path)
        try:
            found = cls(
                Round(**about["round"]),
                about["unit"],
                about["model"],
                arrays["units"],
                about["how"],
            )
            found._check(path)
        except (TypeError, KeyError) as error:
            raise UserError(f"{path} is not what select-batches writes: {error}") from error
        return found

    def write(self, folder: epath.Path) -> None:
        about = {
            "round": dataclasses.asdict(self.round),
            "unit": self.unit,
            "model": self.model,
            "how": self.how,
        }
        write_arrays(folder / INDEX, {"units": self.units}, about)

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
        facts = hashlib.sha256(json.dumps(self.how, sort_keys=True).encode())
        facts.update(np.ascontiguousarray(self.units, np.int64))
        return {
            "digest": facts.hexdigest(),
            "unit": self.unit,
            "round": dataclasses.asdict(self.round),
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
