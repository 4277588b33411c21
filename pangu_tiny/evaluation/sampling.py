"""Tokens drawn one after the other, with a key-value cache.

Axes: t position, v vocabulary.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pangu_tiny.errors import check_number
from pangu_tiny.model.attention import Cache, empty_cache
from pangu_tiny.model.decoder import Decoder, parameter_shapes, project

_CACHE_MULTIPLE = 64  # so that prompts of about the same length share a compiled step


def check_sampling(temperature: float, top_k: int, top_p: float) -> None:
    """Refuses settings out of range."""
    check_number("generate.temperature", temperature, 0)
    check_number("generate.top_k", top_k, 0)
    check_number("generate.top_p", top_p, above=0, most=1)


def sample(
    decoder: Decoder,
    params: dict[str, Any],
    prompt_ids: Sequence[int],
    tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    end_id: int | None = None,
    vocab_size: int | None = None,
) -> Iterator[int]:
    """Draws up to `tokens` ids after `prompt_ids` (at least one), without the end mark.

    `vocab_size`: ids below it may be drawn, where the model has more than its tokenizer.
    """
    settings = {
        "decoder": decoder,
        "vocab_size": vocab_size or decoder.shape.vocab_size,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
    }
    cache = _cache(decoder, len(prompt_ids) + tokens)
    feed = jnp.asarray([prompt_ids], jnp.int32)
    for key in jax.random.split(jax.random.key(seed), tokens):
        token, cache = advance(params, feed, cache, key, **settings)
        if end_id is not None and int(token) == end_id:
            return
        yield int(token)
        feed = token[None, None]


def step_shapes(decoder: Decoder, positions: int) -> tuple[Any, ...]:
    """Of what `advance` takes to draw one token, of a sequence of so many."""
    token_11 = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    cache = jax.eval_shape(lambda: _cache(decoder, positions))
    key = jax.eval_shape(lambda: jax.random.key(0))
    return parameter_shapes(decoder.shape), token_11, cache, key


def _cache(decoder: Decoder, positions: int) -> Cache:
    capacity = -(-positions // _CACHE_MULTIPLE) * _CACHE_MULTIPLE
    return empty_cache(decoder.shape, 1, capacity, decoder.dtype)


@functools.partial(
    jax.jit,
    static_argnames=("decoder", "vocab_size", "temperature", "top_k", "top_p"),
    donate_argnames="cache",
)
def advance(
    params: dict[str, Any],
    tokens_1t: jax.Array,
    cache: Cache,
    key: jax.Array,
    *,
    decoder: Decoder,
    vocab_size: int,
    temperature: float,
    top_k: int,
    top_p: float,
) -> tuple[jax.Array, Cache]:
    """Feeds tokens and draws the one that follows the last of them."""
    applied: Any = decoder.apply({"params": params}, tokens_1t, cache=cache)
    logits_v = project(applied[0][:, -1], params, vocab_size)[0]
    return draw(logits_v, key, temperature, top_k, top_p), applied[1]


def draw(
    logits_v: jax.Array, key: jax.Array, temperature: float, top_k: int, top_p: float
) -> jax.Array:
    """One id from float32 logits: the likeliest at temperature 0, else drawn among those that
    both top_k and top_p leave."""
    if temperature == 0:
        return jnp.argmax(logits_v)
    logits_v = logits_v / temperature
    order_v = jnp.argsort(logits_v, descending=True)
    ranked_v = logits_v[order_v]
    before_v = jnp.cumsum(jax.nn.softmax(ranked_v)) - jax.nn.softmax(ranked_v)
    kept_v = before_v < top_p
    if top_k:
        kept_v &= jnp.arange(len(ranked_v)) < min(top_k, len(ranked_v))
    kept_v = kept_v.at[0].set(True)
    return order_v[jax.random.categorical(key, jnp.where(kept_v, ranked_v, -jnp.inf))]
