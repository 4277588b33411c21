"""Rows of token ids: the packing rule, written and read.

The rule (version `PACKING`):

- A document is its begin mark, the ids of its text (never a mark), its end mark.
- The documents of a shard follow one another; that is the shard's token stream.
- A row holds sequence_length + 1 consecutive tokens of the stream. Its targets are its tokens but
  the first.
- If a row's last token is an end mark, the next row starts with the token after it. Otherwise the
  row is cut there, and the next row starts with that same token again: they overlap by one. So
  every text token and every end mark is a target exactly once. A begin mark is never a target.
- What is left of a shard's last row is padding, written as end marks. So an end mark that follows
  an end mark, or that opens a row, is padding, and there is no other.
- A continued piece starts at position 0 and sees nothing that lies before the cut.

Everything else is read from the ids: rows carry no masks, no segments and no lengths.

Axes: b row, t token of a row (sequence_length + 1 in a stored row, sequence_length elsewhere).
"""

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    import jax

PACKING = 1


class Marks(NamedTuple):
    """The ids that open and close every document."""

    begin_id: int
    end_id: int


class Marked(NamedTuple):
    """What a model and its loss need of some rows, each [b, sequence_length].

    Attributes:
      inputs: int32 ids.
      targets: int32 ids, the token that follows each input.
      weights: float32, 1 where the target counts: a text token or end mark of the same document.
      segments: int32, which piece of a document an input belongs to, from 1; 0 is padding.
      positions: int32, from 0 at the start of each piece; 0 in padding.
    """

    inputs: "jax.Array"
    targets: "jax.Array"
    weights: "jax.Array"
    segments: "jax.Array"
    positions: "jax.Array"


def read_marks(rows_bt: "jax.Array", begin_id: int, end_id: int) -> Marked:
    """Derives targets, weights, segments and positions of rows [b, sequence_length + 1] of ids."""
    # The processes that pack text import this module too, and have no use for JAX.
    import jax
    import jax.numpy as jnp

    rows_bt = jnp.asarray(rows_bt, jnp.int32)
    inputs_bt, targets_bt = rows_bt[:, :-1], rows_bt[:, 1:]
    weights_bt = inputs_bt != end_id  # after an end mark: a begin mark or padding

    index_t = jnp.arange(inputs_bt.shape[1], dtype=jnp.int32)
    ends_bt = inputs_bt == end_id
    after_end_bt = jnp.pad(ends_bt[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    padding_bt = ends_bt & after_end_bt
    starts_bt = (inputs_bt == begin_id) | (index_t == 0)
    segments_bt = jnp.cumsum(starts_bt, axis=1, dtype=jnp.int32)
    first_bt = jax.lax.cummax(jnp.where(starts_bt, index_t, 0), axis=1)
    return Marked(
        inputs=inputs_bt,
        targets=targets_bt,
        weights=weights_bt.astype(jnp.float32),
        segments=jnp.where(padding_bt, 0, segments_bt),
        positions=jnp.where(padding_bt, 0, index_t - first_bt),
    )


class Packer:
    """Packs the documents of one shard into rows, as they come.

    Attributes:
      rows, documents, tokens, padding, cut_documents: what has been packed so far. Tokens are
        those of the stream: text and both marks, without overlaps and padding.
    """

    def __init__(self, sequence_length: int, begin_id: int, end_id: int):
        self.rows = self.documents = self.tokens = self.padding = self.cut_documents = 0
        self._length = sequence_length + 1
        self._begin_id, self._end_id = begin_id, end_id
        self._rest = np.empty(0, np.int32)

    def add(self, texts: Iterable[np.ndarray]) -> list[np.ndarray]:
        """Takes documents, given as the ids of their text, and returns the rows now full."""
        begin, end = np.array([self._begin_id]), np.array([self._end_id])
        pieces = [self._rest]
        for ids in texts:
            pieces += [begin, ids, end]
            self.documents += 1
            self.tokens += len(ids) + 2
        stream = np.concatenate(pieces).astype(np.int32)
        rows, start = [], 0
        while start + self._length <= len(stream):
            row = stream[start : start + self._length]
            rows.append(row)
            cut = bool(row[-1] != self._end_id)
            start += self._length - cut
            if cut and row[-1] != self._begin_id and (row == self._begin_id).any():
                self.cut_documents += 1
        self._rest = stream[start:].copy()
        self.rows += len(rows)
        return rows

    def finish(self) -> list[np.ndarray]:
        """The last row, filled up with padding, if any token is left for it."""
        rest, self._rest = self._rest, self._rest[:0]
        if not len(rest):
            return []
        missing = self._length - len(rest)
        self.padding += missing
        self.rows += 1
        return [np.pad(rest, (0, missing), constant_values=self._end_id)]


def token_stream(rows: Iterable[np.ndarray], end_id: int) -> Iterator[np.ndarray]:
    """Rebuilds the documents of one shard from all its rows, in their order.

    Yields:
      Each document's ids, its two marks included.

    Raises:
      ValueError: the rows end inside a document.
    """
    document: list[np.ndarray] = []
    for row in rows:
        fresh = row[1:] if document else row
        starts = 0
        for end in np.flatnonzero(fresh == end_id).tolist():
            if end == starts and not document:
                break
            yield np.concatenate([*document, fresh[starts : end + 1]])
            document, starts = [], end + 1
        else:
            if starts < len(fresh):
                document.append(fresh[starts:])
    if document:
        raise ValueError("the rows end inside a document")
