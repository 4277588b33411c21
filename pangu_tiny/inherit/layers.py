"""Which layers of a big model stay."""

import dataclasses

import numpy as np

from pangu_tiny.errors import UserError, check_number, check_one_of

WINDOWS = (1, 2, 3)
"""How many adjacent layers are skipped at once, as in the paper's figure."""

RULES = ("importance", "even", "listed")
SCORES = (*(f"skip_{window}" for window in WINDOWS), "influence")


@dataclasses.dataclass(frozen=True)
class LayerChoice:
    """How layers are chosen; they keep their order.

    Attributes:
      rule: "importance" drops the least important ones, "even" keeps them evenly spaced, "listed"
        keeps those of `layers`.
      first, last: how many at the beginning and at the end stay in any case. None is 2, or fewer
        where less than 4 layers are to stay: of 3 the first 2 and the last, of 2 the first and the
        last, of 1 the first. Not stated in the paper: chosen because it finds the first 2 to 3 and
        the last few important, the first most of all. None makes room for the other where that is
        given.
      score: what "importance" goes by: "skip_1", "skip_2" or "skip_3", the rise of the held-out
        loss when so many adjacent layers are skipped (of the windows that a layer is in, the mean
        rise per layer), or "influence", one less the cosine between a layer's input and output.
        The paper does not state how its three curves become a choice: chosen "skip_1", which
        speaks of one layer.
      layers: layers of the teacher, from 0, for "listed".
    """

    rule: str = "importance"
    first: int | None = None
    last: int | None = None
    score: str = "skip_1"
    layers: list[int] | None = None

    def __post_init__(self):
        check_one_of("LayerChoice.rule", self.rule, RULES)
        check_one_of("LayerChoice.score", self.score, SCORES)
        for name in ("first", "last"):
            check_number(f"LayerChoice.{name}", getattr(self, name), 0)
        if (self.layers is not None) != (self.rule == "listed"):
            raise UserError("LayerChoice.layers and rule = 'listed' go together, expected both")

    @property
    def measures(self) -> bool:
        """Whether layers have to be ranked first."""
        return self.rule == "importance"

    def at(self, depth: int) -> "LayerChoice":
        """The same choice with `first` and `last` as they are where `depth` layers are to stay."""
        first, last = self.first, self.last
        if first is None:
            first = max(0, min(2, -(-depth // 2), depth - (last or 0)))
        if last is None:
            last = max(0, min(2, depth - first))
        return dataclasses.replace(self, first=first, last=last)

    def choose(self, layers: int, depth: int, scores: np.ndarray | None) -> list[int]:
        """The layers that stay, ascending.

        Args:
          layers: how many the teacher has.
          depth: how many are to stay.
          scores: [layers], what each matters; None where the rule needs none.
        """
        if depth > layers:
            raise UserError(f"ModelShape.depth is {depth}, but the teacher has {layers} layers")
        if self.rule == "listed":
            check_layers("LayerChoice.layers", self.layers, layers, depth)
            return self.layers
        if depth == layers:
            return list(range(layers))
        if self.rule == "even":
            return [int(place) for place in np.round(np.linspace(0, layers - 1, depth))]
        ends = self.at(depth)
        if ends.first + ends.last > depth:
            raise UserError(
                f"LayerChoice.first {ends.first} and last {ends.last} are more than the "
                f"{depth} layers that are to stay"
            )
        ranked = np.array(scores, np.float64)
        ranked[: ends.first] = np.inf
        ranked[layers - ends.last :] = np.inf
        return sorted(np.argsort(-ranked, kind="stable")[:depth].tolist())


def check_layers(where: str, found: list[int], layers: int, depth: int) -> None:
    """Refuses a list that is not `depth` layers of the teacher, ascending."""
    numbers = isinstance(found, list) and all(type(layer) is int for layer in found)
    inside = numbers and all(0 <= layer < layers for layer in found)
    if not inside or len(found) != depth or sorted(set(found)) != found:
        raise UserError(
            f"{where} is {found}, expected {depth} layers from 0 to {layers - 1}, ascending"
        )


def window_scores(rises: np.ndarray, window: int) -> np.ndarray:
    """[layers], the mean rise per layer over all windows that a layer is in; `rises`
    [layers − window + 1] is by the first layer of the window."""
    layers = len(rises) + window - 1
    total, count = np.zeros(layers), np.zeros(layers)
    for first, rise in enumerate(rises):
        total[first : first + window] += rise / window
        count[first : first + window] += 1
    return total / count
