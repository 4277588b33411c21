"""How likely texts are: the negative log-likelihood of all of a text, or of its end, in nats.

What the choices of a question begin with is read once: a row of positions holds it, then each
choice, which sees it and not the others. A row holds as many questions as there is room for, so
that little is padding, and few programs are compiled: one for every multiple of 256 positions. With
a mesh in context the batch is cut as the model is.

Axes: b row, t position, k choice.
"""

import functools
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pangu_tiny.evaluation.decoding import PIECE, shards
from pangu_tiny.model.attention import Cache, Packing, empty_cache
from pangu_tiny.model.cached import extend
from pangu_tiny.model.decoder import Decoder, head_kernel
from pangu_tiny.program.loss import cross_entropy
from pangu_tiny.topology.mesh import constrain


class Shared(NamedTuple):
    """The choices of a question, in ids, apart at the first that differs.

    Attributes:
      first: ids that all begin with, but for the last of these.
      rests: that last id and what follows it, of each choice.
      start: the place, from 0, of the first id that is scored; before the first there is nothing by
        which it could be.
    """

    first: list[int]
    rests: list[list[int]]
    start: int = 1

    @classmethod
    def of(cls, choices: Sequence[list[int]], start: int = 1) -> "Shared":
        columns = itertools.takewhile(lambda ids: len(set(ids)) == 1, zip(*choices, strict=False))
        shared = max(sum(1 for _ in columns), 1)
        return cls(choices[0][: shared - 1], [ids[shared - 1 :] for ids in choices], start)

    @property
    def positions(self) -> int:
        """That it takes in a row. Of each rest the last is read by nobody; equal ones are one."""
        return len(self.first) + sum(len(ids) - 1 for ids in set(map(tuple, self.rests)))


class Scores(NamedTuple):
    """Nats of every choice, float64 [k], and whether all that is scored of it is the likeliest."""

    nats_k: np.ndarray
    likeliest_k: np.ndarray


def rows_of(positions: Sequence[int]) -> list[list[list[int]]]:
    """Rows of each length: which questions, by their place among the given, stand in each. The
    longest are put first, each where it leaves the least room."""
    rows: dict[int, list[list[int]]] = {}
    room: dict[int, dict[int, list[list[int]]]] = {}  # by length and by what is left
    for place in sorted(range(len(positions)), key=lambda place: (-positions[place], place)):
        taken = positions[place]
        length = _length(taken)
        of_length = room.setdefault(length, {})
        left = next((left for left in range(taken, length) if of_length.get(left)), length)
        if left < length:
            row = of_length[left].pop()
        else:
            row = []
            rows.setdefault(length, []).append(row)
        row.append(place)
        of_length.setdefault(left - taken, []).append(row)
    return [rows[length] for length in sorted(rows)]


def _length(positions: int) -> int:
    """Of the row that holds so many."""
    return max(-(-positions // PIECE), 1) * PIECE


def score(
    decoder: Decoder,
    params: dict[str, Any],
    rows: Sequence[Sequence[Shared]],
    chunk: int,
) -> list[Scores]:
    """Scores of all questions, row by row.

    Args:
      params: of `by_layer`.
      rows: of questions; some may be empty.
      chunk: tokens per device whose logits exist at one time.
    """
    length = _length(max(sum(one.positions for one in row) for row in rows))
    laid = _Laid.out(rows, -(-len(rows) // shards()) * shards(), length)
    cache = _empty(laid.packing, decoder=decoder)
    settings = {"decoder": decoder, "chunk": chunk}
    pieces = []
    for start in range(0, length, PIECE):
        piece = slice(start, start + PIECE)
        rows_bt = [x_bt[:, piece] for x_bt in (laid.inputs, laid.targets, laid.weights)]
        if rows_bt[-1].any():
            found_2bt, cache = _read(params, *rows_bt, cache, **settings)
        else:
            cache = _pass(params, rows_bt[0], cache, decoder=decoder)
            found_2bt = np.zeros((2, *rows_bt[0].shape), np.float32)
        pieces.append(found_2bt)
    # What is computed is waited for here, after all of it was begun.
    nats_bt, missed_bt = np.concatenate([np.asarray(found, np.float64) for found in pieces], axis=2)
    return [
        Scores(
            np.asarray([nats_bt[row][of_choice].sum() for of_choice in spans]),
            np.asarray([not missed_bt[row][of_choice].any() for of_choice in spans]),
        )
        for row, spans in laid.spans
    ]


class _Laid(NamedTuple):
    """Questions laid out in rows; of each in which row, and the positions of each choice."""

    inputs: np.ndarray
    targets: np.ndarray
    weights: np.ndarray
    packing: Packing
    spans: list[tuple[int, list[np.ndarray]]]

    @classmethod
    def out(cls, rows: Sequence[Sequence[Shared]], b: int, length: int) -> "_Laid":
        numbers: Any = np.zeros((5, b, length), np.int32)
        inputs, targets, *packing = numbers
        weights = np.zeros((b, length), bool)
        laid = cls(inputs, targets, weights, Packing(*packing), [])
        for row, questions in enumerate(rows):
            end = 0
            for number, question in enumerate(questions, 1):
                shared = [*question.first, question.rests[0][0]]
                first = laid._put(row, end, shared, (number, 0, 0), question.start)
                end += len(question.first)
                # Equal choices are one, so that they score the same and the first of them counts.
                spans: dict[tuple[int, ...], np.ndarray] = {}
                for choice, ids in enumerate(dict.fromkeys(map(tuple, question.rests)), 1):
                    at = (number, choice, len(question.first))
                    spans[ids] = np.r_[first, laid._put(row, end, ids, at, question.start)]
                    end += len(ids) - 1
                laid.spans.append((row, [spans[tuple(ids)] for ids in question.rests]))
        return laid

    def _put(
        self, row: int, begin: int, ids: Sequence[int], at: tuple[int, int, int], start: int
    ) -> np.ndarray:
        """Ids and those that follow them, from a position on; the positions of these."""
        span = np.arange(begin, begin + len(ids) - 1)
        text, way, first = at
        self.inputs[row, span], self.targets[row, span] = ids[:-1], ids[1:]
        self.packing.text[row, span], self.packing.way[row, span] = text, way
        self.packing.place[row, span] = first + np.arange(len(span))
        self.weights[row, span] = first + np.arange(1, len(span) + 1) >= start
        return span


@functools.partial(jax.jit, static_argnames="decoder")
def _empty(packing: Packing, *, decoder: Decoder) -> Cache:
    b, length = packing.text.shape
    return empty_cache(decoder.shape, length, jnp.zeros(b, jnp.int32), decoder.dtype, packing)


@functools.partial(jax.jit, static_argnames="decoder", donate_argnames="cache")
def _pass(params, inputs_bt, cache, *, decoder):
    return extend(decoder, params, inputs_bt, cache)[1]


@functools.partial(jax.jit, static_argnames=("decoder", "chunk"), donate_argnames="cache")
def _read(params, inputs_bt, targets_bt, weights_bt, cache, *, decoder, chunk):
    hidden_btd, cache = extend(decoder, params, inputs_bt, cache)
    loss = cross_entropy(
        hidden_btd,
        head_kernel(params),
        targets_bt,
        weights_bt.astype(jnp.float32),
        vocab_size=decoder.shape.vocab_size,
        chunk=chunk,
    )
    missed_bt = weights_bt & ~loss.likeliest_bt
    return constrain(jnp.stack([loss.nats_bt, missed_bt]), None, None, None), cache
