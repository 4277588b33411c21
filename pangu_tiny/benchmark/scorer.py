"""How likely texts are: the negative log-likelihood of all of a text, or of its end, in nats.

What the choices of a question begin with is read once, into a cache from which each goes on. It is
padded on the left, and what follows on the right, to a few sizes, so that few programs are
compiled. With a mesh in context the batch is cut as the model is.

Axes: b question, t position, k choice.
"""

import functools
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pangu_tiny.evaluation.decoding import PIECE, shards
from pangu_tiny.model.attention import Cache, empty_cache
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
    def size(self) -> tuple[int, int]:
        """Positions of both, padded; those of one size are compiled once."""
        # Of what rests the last is read by nobody.
        return _padded(len(self.first), 16), _padded(max(map(len, self.rests)) - 1, 4)


def _padded(length: int, least: int) -> int:
    """To a power of two, or a multiple of the pieces: of few sizes, since for each is compiled."""
    if length > PIECE:
        return -(-length // PIECE) * PIECE
    return max(least, 1 << max(length - 1, 0).bit_length())


class Scores(NamedTuple):
    """Nats of every choice, float64 [b, k], and whether each of its ids is the likeliest."""

    nats_bk: np.ndarray
    likeliest_bk: np.ndarray


def score(
    decoder: Decoder, params: dict[str, Any], questions: Sequence[Shared], chunk: int
) -> Scores:
    """Scores of questions that have as many choices each.

    Args:
      params: of `by_layer`.
      chunk: tokens per device whose logits exist at one time.
    """
    filled = [*questions, *[questions[0]] * (-len(questions) % shards())]
    widths, rests = (max(sizes) for sizes in zip(*(q.size for q in filled), strict=True))
    begins_b = np.asarray([widths - len(question.first) for question in filled], np.int32)
    cache = _empty(begins_b, decoder=decoder, capacity=widths + rests)
    first_bt = np.zeros((len(filled), widths + 1), np.int32)
    for row_t, question in zip(first_bt, filled, strict=True):
        # What follows the last is scored with it; it is also the first of what rests.
        ids = [*question.first, question.rests[0][0]]
        row_t[widths + 1 - len(ids) :] = ids
    starts_b1 = np.asarray([[question.start] for question in filled])
    places_bt = np.arange(1, widths + 1) - begins_b[:, None]
    weights_bt = (places_bt > 0) & (places_bt >= starts_b1)
    settings = {"decoder": decoder, "chunk": chunk}
    pieces = []
    for start in range(0, widths, min(PIECE, widths)):
        piece = slice(start, start + min(PIECE, widths))
        following = slice(piece.start + 1, piece.stop + 1)
        rows = (first_bt[:, piece], first_bt[:, following], weights_bt[:, piece])
        if rows[-1].any():
            rows_2b, cache = _read(params, *rows, cache, **settings)
            pieces.append(rows_2b)
        else:
            cache = _pass(params, rows[0], cache, decoder=decoder)
    found = []
    for choice in range(len(questions[0].rests)):
        inputs_bt, targets_bt = (np.zeros((len(filled), rests), np.int32) for _ in range(2))
        weights_bt = np.zeros((len(filled), rests), bool)
        for b, question in enumerate(filled):
            ids = question.rests[choice]
            unscored = max(question.start - len(question.first) - 1, 0)
            inputs_bt[b, : len(ids) - 1], targets_bt[b, : len(ids) - 1] = ids[:-1], ids[1:]
            weights_bt[b, unscored : len(ids) - 1] = True
        found.append(_answer(params, inputs_bt, targets_bt, weights_bt, cache, **settings))
    # What is computed is waited for here, after all of it was begun.
    shared_2b = np.sum([np.asarray(rows_2b, np.float64) for rows_2b in pieces], axis=0)
    nats_bk, hits_bk = np.asarray(
        [shared_2b + np.asarray(rows_2b, np.float64) for rows_2b in found]
    ).transpose(1, 2, 0)[:, : len(questions)]
    scored_bk = [
        [len(question.first) + len(ids) - question.start for ids in question.rests]
        for question in questions
    ]
    return Scores(nats_bk, hits_bk >= scored_bk)


@functools.partial(jax.jit, static_argnames=("decoder", "capacity"))
def _empty(begins_b: jax.Array, *, decoder: Decoder, capacity: int) -> Cache:
    return empty_cache(decoder.shape, capacity, begins_b, decoder.dtype)


def _scored(params, inputs_bt, targets_bt, weights_bt, cache, *, decoder, chunk):
    hidden_btd, cache = extend(decoder, params, inputs_bt, cache)
    loss = cross_entropy(
        hidden_btd,
        head_kernel(params),
        targets_bt,
        weights_bt.astype(jnp.float32),
        vocab_size=decoder.shape.vocab_size,
        chunk=chunk,
    )
    return constrain(jnp.stack([loss.rows_b, loss.hits_b]), None, None), cache


@functools.partial(jax.jit, static_argnames="decoder", donate_argnames="cache")
def _pass(params, inputs_bt, cache, *, decoder):
    return extend(decoder, params, inputs_bt, cache)[1]


_read: Any = jax.jit(_scored, static_argnames=("decoder", "chunk"), donate_argnames="cache")


@functools.partial(jax.jit, static_argnames=("decoder", "chunk"))
def _answer(*arguments, **settings):
    return _scored(*arguments, **settings)[0]
