"""A big tokenizer, what a cut leaves of it, and the map between the two."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from pangu_tiny.errors import UserError, failing_as
from pangu_tiny.tokenizer import proto
from pangu_tiny.tokenizer.model import Tokenizer
from pangu_tiny.typed import NO, convert
from pangu_tiny.vocabulary import prune
from pangu_tiny.vocabulary.pieces import Vocabulary
from pangu_tiny.workdir import check_same, finished, read_json

TOKENIZER, ID_MAP = "tokenizer.model", "id_map.json"


class Cut(NamedTuple):
    """A big tokenizer with all that a cut is decided by.

    Attributes:
      gone: the ids that may go, the first to go first.
      times: int64 [n], how often each id was counted.
      merged_through: whether what goes stays as an unused piece.
    """

    tokenizer: Tokenizer
    vocabulary: Vocabulary
    gone: np.ndarray
    times: np.ndarray
    merged_through: bool

    @classmethod
    def plan(
        cls,
        tokenizer: Tokenizer,
        vocabulary: Vocabulary,
        times: np.ndarray,
        method: str,
        keep: Sequence[str] = (),
    ) -> "Cut":
        """Decides what goes first from a BPE model.

        Args:
          times: int [n], how often each id was counted.
          method: one of `prune.METHODS`.
          keep: pieces that must stay, by name.
        """
        if unused := int((vocabulary.kinds == proto.UNUSED).sum()):
            raise UserError(
                f"tokenizer {tokenizer.name} has {unused:,} unused pieces, which would take rows"
                " that are never emitted; if it was cut before, cut the whole one instead"
            )
        gone = prune.order(method, vocabulary, times, prune.required(vocabulary, list(keep)))
        return cls(tokenizer, vocabulary, gone, times, method == "unused")

    @property
    def smallest(self) -> int:
        return len(self.vocabulary.pieces) - len(self.gone)

    def kept(self, size: int) -> np.ndarray:
        """The ids that stay, ascending."""
        out = self.gone[: len(self.vocabulary.pieces) - size]
        return np.setdiff1d(np.arange(len(self.vocabulary.pieces)), out, assume_unique=True)

    def coverage(self) -> np.ndarray:
        """[s], the share of the counted tokens whose ids are kept at each size, from the smallest
        to the whole."""
        lost = np.cumsum(self.times[self.gone])[::-1]
        return 1 - np.append(lost, 0) / self.times.sum()

    def compact(self, size: int) -> Tokenizer:
        """The tokenizer of that size. Unreachable pieces are removed, and so are single characters,
        which would be emitted though they are unused."""
        kept = self.kept(size)
        if not self.merged_through:
            return self.tokenizer.select(kept)
        lost = np.ones(len(self.vocabulary.pieces), bool)
        lost[kept] = False
        lost &= ~self.vocabulary.unreachable & ~self.vocabulary.single
        return self.tokenizer.select(kept, np.flatnonzero(lost))


def id_map(cut: Cut, compact: Tokenizer, size: int, method: str) -> dict[str, Any]:
    """What id_map.json holds."""
    small = Vocabulary.of(compact)
    kept = cut.kept(size)
    old_to_new: list[list[int]] = [[] for _ in cut.vocabulary.pieces]
    for new, old in enumerate(kept):
        old_to_new[old] = [new]
    for old in cut.gone[: len(cut.vocabulary.pieces) - size]:
        old_to_new[old] = small.emit(cut.vocabulary.pieces[old])
    return {
        "method": method,
        "exact": cut.merged_through,
        "old_digest": cut.tokenizer.digest,
        "new_digest": compact.digest,
        "old_to_new": old_to_new,
        "new_to_old": kept.tolist(),
    }


@dataclasses.dataclass(frozen=True, eq=False)
class IdMap:
    """The id_map.json of a folder of compress-tokenizer.

    Attributes:
      folder, method, exact, old_digest, new_digest: as there.
      old_to_new: for every old id its new ones.
      new_to_old: for every new id the old one.
    """

    folder: str
    method: str
    exact: bool
    old_digest: str
    new_digest: str
    old_to_new: list[list[int]]
    new_to_old: list[int]

    @classmethod
    def open(cls, folder: str) -> "IdMap":
        """Reads the map."""
        file = finished("tokenizer", folder, "compress-tokenizer", ID_MAP)
        with failing_as(f"{file} is not what compress-tokenizer writes", TypeError):
            id_map = cls(folder, **read_json(file))
            if convert(id_map.new_to_old, list[int]) is NO:
                raise TypeError("new_to_old is not a list of ids")
            return id_map

    def tokenizer(self) -> Tokenizer:
        """The compact tokenizer beside the map."""
        compact = Tokenizer.open(epath.Path(self.folder) / TOKENIZER)
        digest = f"tokenizer {compact.name} has digest"
        check_same(digest, compact.digest, f"{ID_MAP} beside it is of", self.new_digest)
        return compact

    def map(self, ids: np.ndarray) -> np.ndarray:
        """What a text's old ids become, int32."""
        flat, starts, lengths = self._table
        counts = lengths[ids]
        firsts = np.cumsum(counts) - counts
        places = np.repeat(starts[ids] - firsts, counts) + np.arange(counts.sum())
        return flat[places]

    @functools.cached_property
    def _table(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        lengths = np.array(list(map(len, self.old_to_new)))
        flat = np.array([new for ids in self.old_to_new for new in ids], np.int32)
        return flat, np.cumsum(lengths) - lengths, lengths
