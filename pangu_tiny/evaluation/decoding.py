"""Continuations of several prompts at once, with a key-value cache of fixed size.

Prompts are padded on the left, so that all of a batch end at the same position, and are read in
pieces of a few sizes; so few programs are compiled, for every size of the cache. What a prompt
gives depends on its own number and the seed, not on the batch.

Axes: b prompt, t position, k token of a stretch, v vocabulary.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pangu_tiny.evaluation.sampling import GREEDY, Sampling, draw
from pangu_tiny.model.attention import Cache, empty_cache
from pangu_tiny.model.decoder import Decoder, parameter_shapes, project

_MULTIPLE = 64  # of the lengths of prompts and caches
_PIECE = 256  # positions that are read at once: each has a score for all positions of the cache


class Drawn(NamedTuple):
    """Tokens int32 [k, b] that follow, and the log-probability of each, float32 [k, b], among all
    that the model might have said."""

    tokens: np.ndarray
    log_probabilities: np.ndarray


def continuations(
    decoder: Decoder,
    params: dict[str, Any],
    prompts: Sequence[Sequence[int]],
    tokens: int,
    *,
    sampling: Sampling = GREEDY,
    seed: int = 0,
    numbers: Sequence[int] | None = None,
    vocab_size: int | None = None,
    stretch: int = 1,
) -> Iterator[Drawn]:
    """Draws on, a stretch of tokens after the other, `tokens` in all or up to `stretch` - 1 more.

    Args:
      prompts: ids, at least one each.
      numbers: of each prompt, with which its draws are seeded; None counts from 0.
      vocab_size: ids below it may be drawn, where the model has more than its tokenizer.
      stretch: tokens that are drawn between two looks at them.
    """
    if not tokens:
        return
    widest = _rounded(max(map(len, prompts)))
    begins = [widest - len(prompt) for prompt in prompts]
    padded = [[0] * begin + list(prompt) for begin, prompt in zip(begins, prompts, strict=True)]
    capacity = _rounded(widest + tokens + stretch)
    begins_b = jnp.asarray(begins, jnp.int32)
    cache = empty_cache(decoder.shape, len(prompts), capacity, decoder.dtype, begins_b)
    keys_b = jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(seed)))(
        jnp.asarray(range(len(prompts)) if numbers is None else numbers, jnp.uint32)
    )
    chosen = {
        "decoder": decoder,
        "vocab_size": vocab_size or decoder.shape.vocab_size,
        "sampling": sampling,
    }
    ends = [*range(widest % _PIECE or _PIECE, widest, _PIECE)]
    for piece_bt in np.split(np.asarray(padded, np.int32), ends, axis=1):
        last_b, log_b, cache = advance(params, piece_bt, cache, keys_b, **chosen)
    yield Drawn(np.asarray(last_b)[None], np.asarray(log_b)[None])
    for _ in range(1, tokens, stretch):
        *drawn, last_b, cache = _draw_on(params, last_b, cache, keys_b, stretch=stretch, **chosen)
        yield Drawn(*map(np.asarray, drawn))


def sample(
    decoder: Decoder,
    params: dict[str, Any],
    prompt: Sequence[int],
    tokens: int,
    end_id: int | None = None,
    **settings: Any,
) -> Iterator[int]:
    """The continuation of one prompt, token by token, without the end mark; for the settings see
    `continuations`."""
    for stretch in continuations(decoder, params, [prompt], tokens, **settings):
        for token in stretch.tokens[:, 0].tolist():
            if token == end_id:
                return
            yield token


def step_shapes(decoder: Decoder, positions: int) -> tuple[Any, ...]:
    """Of what `advance` takes to draw one token, of a sequence of so many."""
    token_11 = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    capacity = _rounded(positions)
    cache = jax.eval_shape(lambda: empty_cache(decoder.shape, 1, capacity, decoder.dtype))
    keys_1 = jax.eval_shape(lambda: jax.random.key(0)[None])
    return parameter_shapes(decoder.shape), token_11, cache, keys_1


def _rounded(positions: int) -> int:
    return -(-positions // _MULTIPLE) * _MULTIPLE


_CHOSEN = ("decoder", "vocab_size", "sampling")


@functools.partial(jax.jit, static_argnames=_CHOSEN, donate_argnames="cache")
def advance(
    params: dict[str, Any],
    tokens_bt: jax.Array,
    cache: Cache,
    keys_b: jax.Array,
    *,
    decoder: Decoder,
    vocab_size: int,
    sampling: Sampling,
) -> tuple[jax.Array, jax.Array, Cache]:
    """Feeds tokens, and draws for each prompt the one that follows the last of them."""
    applied: Any = decoder.apply({"params": params}, tokens_bt, cache=cache)
    logits_bv = project(applied[0][:, -1], params, vocab_size)
    positions_b = applied[1].length - cache.begins
    keys_b = jax.vmap(jax.random.fold_in)(keys_b, positions_b)
    token_b = jax.vmap(functools.partial(draw, sampling=sampling))(logits_bv, keys_b)
    log_bv = jax.nn.log_softmax(logits_bv)
    log_b = jnp.take_along_axis(log_bv, token_b[:, None], axis=1)[:, 0]
    return token_b.astype(jnp.int32), log_b, applied[1]


@functools.partial(jax.jit, static_argnames=(*_CHOSEN, "stretch"), donate_argnames="cache")
def _draw_on(
    params: dict[str, Any],
    last_b: jax.Array,
    cache: Cache,
    keys_b: jax.Array,
    *,
    stretch: int,
    **chosen: Any,
) -> tuple[jax.Array, jax.Array, jax.Array, Cache]:
    def one(carried, _):
        token_b, log_b, cache = advance(params, carried[0][:, None], carried[1], keys_b, **chosen)
        return (token_b, cache), (token_b, log_b)

    (last_b, cache), (tokens_kb, logs_kb) = jax.lax.scan(one, (last_b, cache), length=stretch)
    return tokens_kb, logs_kb, last_b, cache
