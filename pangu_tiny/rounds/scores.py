"""What score-batches found, as it lies on disk.

A folder of score-batches holds

    scores.npz    nats [units] and targets [units]: the sum of the losses of each unit, and of how
                  many targets it is. float64 and int64 for batches, float32 and int32 for sequences
                  sources: rows of each source in each batch, int32 [units, sources], or the source
                  of each sequence, int16 [units]
                  about: JSON: the round, the unit, digests of the model, names of the sources
    report.html   forgetting, as a picture
"""

import dataclasses
from typing import Any

import numpy as np
from etils import epath

from pangu_tiny.arrays import read_described, write_arrays
from pangu_tiny.data.order import Round
from pangu_tiny.errors import UserError, failing_as
from pangu_tiny.workdir import digest_of, finished

SCORES = "scores.npz"
_ARRAYS = ("nats", "targets", "sources")


@dataclasses.dataclass(frozen=True, eq=False)
class Scores:
    """The losses of a round under one model.

    Attributes:
      round, unit: what was scored.
      model: digest of the checkpoint.
      dtype: of its matrix products.
      source_names: of the dataset.
      nats, targets, sources: as in scores.npz.
    """

    round: Round
    unit: str
    model: str
    dtype: str
    source_names: list[str]
    nats: np.ndarray
    targets: np.ndarray
    sources: np.ndarray

    @classmethod
    def open(cls, folder: str) -> "Scores":
        """Reads a workdir of score-batches."""
        path = finished("scores", folder, "score-batches", SCORES)
        about, arrays = read_described(path)
        with failing_as(f"{path} is not what score-batches writes", TypeError, KeyError):
            fields: dict[str, Any] = about | {"round": Round(**about["round"])} | arrays
            scores = cls(**fields)
            wanted = scores.round.units(scores.unit)
        shapes = {scores.nats.shape, scores.targets.shape, scores.sources.shape[:1]}
        if shapes != {(wanted,)}:
            raise UserError(f"{path} has arrays of {shapes}, its round has {wanted} units")
        return scores

    def write(self, folder: epath.Path) -> None:
        arrays = {name: getattr(self, name) for name in _ARRAYS}
        write_arrays(folder / SCORES, arrays, self.about)

    @property
    def about(self) -> dict[str, Any]:
        """All but the arrays, as JSON values."""
        facts = {name: value for name, value in vars(self).items() if name not in _ARRAYS}
        return facts | {"round": vars(self.round)}

    @property
    def digest(self) -> str:
        """sha256 of what was scored, how, and what came out."""
        return digest_of(self.about, self.nats, self.targets)

    def losses(self) -> np.ndarray:
        """float64 [units], nats per target."""
        return np.divide(self.nats, np.maximum(1, self.targets), dtype=np.float64)

    def rows_by_source(self, units: np.ndarray | slice = slice(None)) -> np.ndarray:
        """int64 [sources], rows among some of the units."""
        if self.sources.ndim == 2:
            return self.sources[units].sum(axis=0, dtype=np.int64)
        return np.bincount(self.sources[units], minlength=len(self.source_names))
