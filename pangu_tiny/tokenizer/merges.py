"""How SentencePiece's BPE comes to each piece: which two parts it merges last.

There is no list of merges. Any two neighbours whose concatenation is a piece may merge; the
highest score goes first, ties go to the left. So a piece is reachable if merging its own characters
gives the piece again, and then the last merge tells its two parts, which are reachable themselves.
A vocabulary in which every piece has its parts reaches all of them by the same merges.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Merges(NamedTuple):
    """parts: int32 [n, 2], the ids of the two parts of each piece; −1 for a single character, for
    a piece that never merges (marks, bytes, user-defined), and for one that cannot be reached.
    dead: bool [n], the pieces that would be emitted if they could be reached."""

    parts: np.ndarray
    dead: np.ndarray


def find_merges(pieces: Sequence[str], scores: np.ndarray, mergeable: np.ndarray) -> Merges:
    """Derives every piece from its characters.

    Args:
      pieces: the text of each piece.
      scores: float [n], the priorities.
      mergeable: bool [n], the pieces that come about by merging (normal and unused ones).
    """
    known = {pieces[i]: int(i) for i in np.flatnonzero(mergeable)}
    priority = {text: float(scores[i]) for text, i in known.items()}
    parts = np.full((len(pieces), 2), -1, np.int32)
    dead = np.zeros(len(pieces), bool)
    for text, i in known.items():
        if len(text) == 1:
            continue
        symbols = list(text)
        while len(symbols) > 2 and _merge_best(symbols, priority):
            pass
        if len(symbols) == 2 and all(len(s) == 1 or s in known for s in symbols):
            parts[i] = [known.get(s, -1) for s in symbols]
        else:
            dead[i] = True
    return Merges(parts, dead)


def _merge_best(symbols: list[str], priority: dict[str, float]) -> bool:
    """Merges the pair of the highest score, the leftmost of equals; False if none can merge."""
    best, place = -np.inf, -1
    for i in range(len(symbols) - 1):
        score = priority.get(symbols[i] + symbols[i + 1])
        if score is not None and score > best:
            best, place = score, i
    if place < 0:
        return False
    symbols[place : place + 2] = [symbols[place] + symbols[place + 1]]
    return True
