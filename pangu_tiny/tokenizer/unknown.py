"""How much of a text a tokenizer does not know.

Text is counted, not tokens: a run of unknown characters is one token, however long it is, and a
lone byte is one for a part of a character. Counted are the UTF-8 bytes of the text as the
tokenizer's own normaliser leaves it, of a space one.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pangu_tiny.tokenizer import proto
from pangu_tiny.tokenizer.model import Tokenizer

_SOME, _MUCH = 0.001, 0.1  # shares of a text that deserve a line, and a warning


def unknown_bytes(
    tokenizer: Tokenizer, texts: Sequence[str], ids: Sequence[np.ndarray]
) -> np.ndarray:
    """int64 [texts], the bytes of each text (there is at least one) that became the unknown piece,
    among the ids that `tokenizer.encode_batch` gave for it."""
    found = np.zeros(len(texts), np.int64)
    places = np.flatnonzero(np.concatenate(ids) == tokenizer.unknown_id)
    ends = np.cumsum([len(ids_t) for ids_t in ids])
    for index in np.unique(np.searchsorted(ends, places, side="right")):
        # What no other piece writes. SentencePiece tells the text of each piece five times slower.
        written = int(tokenizer.written_bytes[ids[index]].sum())
        found[index] = _size(tokenizer.normalize(texts[index])) - written
    return found


def text_bytes(tokenizer: Tokenizer, times: np.ndarray, unknown: int) -> dict[str, int]:
    """What an entry of counts.json or dataset.json says of this.

    Args:
      times: int [pieces], how often each id was emitted.
      unknown: bytes that became the unknown piece.

    Returns:
      `normalised_bytes`, of all text, and `unknown_bytes`, those of them that became the unknown
      piece or lone bytes.
    """
    lone = int(times[tokenizer.kinds == proto.BYTE].sum())
    return {
        "normalised_bytes": int(times @ tokenizer.written_bytes) + unknown,
        "unknown_bytes": lone + unknown,
    }


def unknown_share(*entries: Mapping[str, Any]) -> float:
    """The share of the text of some entries that is unknown or in lone bytes; 0 where there is
    none, or where an earlier version wrote them, which did not count it."""
    total = sum(entry.get("normalised_bytes", 0) for entry in entries)
    return sum(entry["unknown_bytes"] for entry in entries) / total if total else 0.0


def unknown_lines(name: str, *entries: Mapping[str, Any]) -> list[str]:
    """A report's lines about the unknown text of a source."""
    share = unknown_share(*entries)
    if share <= _SOME:
        return []
    line = f"{share:.2%} of the text of {name} is unknown to the tokenizer, or in lone bytes"
    if share > _MUCH:
        return [f"  WARNING: {line}; it was not made for that text"]
    return [f"  unknown      {line}"]


def _size(text: str) -> int:
    return len(text.replace(proto.SPACE, " ").encode())
