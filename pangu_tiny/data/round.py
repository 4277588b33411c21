"""What a round is, and the units that it is scored and drawn in."""

import dataclasses
from typing import Any

UNITS = {"batch": "batches", "sequence": "sequences"}
"""What a round may be scored and drawn in, and what several are called."""


@dataclasses.dataclass(frozen=True)
class Round:
    """The batches 0 … `batches` − 1 that a run trained, of one order of one dataset.

    A unit is one of these batches, or one of their sequences; unit i is what stands at place i of
    the order, counted in units.

    Attributes:
      dataset: digest.
      seed, mixture, shuffle, global_batch: of the order, see `data/loader.py`.
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

    def differences(self, other: "Round") -> str:
        """What differs, as 'name is X there, Y here', here being `other`; '' where nothing does."""
        there, here = dataclasses.asdict(self), dataclasses.asdict(other)
        return "; ".join(
            f"{name} is {_short(there[name])} there, {_short(here[name])} here"
            for name in there
            if there[name] != here[name]
        )


def _short(value: Any) -> Any:
    return value[:12] if isinstance(value, str) else value
