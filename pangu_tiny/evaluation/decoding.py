"""Continuations of several prompts at once, with a key-value cache of fixed size.

Prompts are padded on the left, so that all of a batch end at the same position, and are read in
pieces of a few sizes; so few programs are compiled, for every size of the cache. What a prompt
gives depends on its own number and the seed, not on the batch. With a mesh in context
(`jax.set_mesh`) the batch and the cache are cut as the model is, and every process is told all.

Axes: b prompt, t position, k token of a stretch, v vocabulary.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from pangu_tiny.evaluation.sampling import GREEDY, Sampling, draw
from pangu_tiny.model.attention import CACHE_AXES, Cache, empty_cache
from pangu_tiny.model.cached import by_layer, extend
from pangu_tiny.model.decoder import Decoder, parameter_shapes, project
from pangu_tiny.model.layout import layer_shardings
from pangu_tiny.topology.mesh import batch_shards, constrain, named_sharding

PIECE = 256
"""Positions that are read at once: each has a score for all positions of the cache."""
_LEAST = 8  # positions for which a program is compiled


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
      params: of `by_layer`.
      prompts: ids, at least one each.
      numbers: of each prompt, with which its draws are seeded; None counts from 0.
      vocab_size: ids below it may be drawn, where the model has more than its tokenizer.
      stretch: tokens that are drawn between two looks at them.
    """
    if not tokens:
        return
    numbers = range(len(prompts)) if numbers is None else numbers
    filled = [*range(len(prompts)), *[0] * (-len(prompts) % shards())]
    pieces, rest = divmod(max(map(len, prompts)) - 1, PIECE)
    widest = pieces * PIECE + rounded(rest + 1)
    begins_b = np.asarray([widest - len(prompts[i]) for i in filled], np.int32)
    padded = [[0] * (widest - len(prompts[i])) + list(prompts[i]) for i in filled]
    keys_b, cache = _begin(
        np.uint32(seed),
        np.asarray([numbers[i] for i in filled], np.uint32),
        begins_b,
        decoder=decoder,
        capacity=rounded(widest + tokens + stretch),
    )
    chosen = {
        "decoder": decoder,
        "vocab_size": vocab_size or decoder.shape.vocab_size,
        "sampling": sampling,
    }
    ends = [*range(widest % PIECE or PIECE, widest, PIECE)]
    for piece_bt in np.split(np.asarray(padded, np.int32), ends, axis=1):
        last_b, log_b, cache = advance(params, piece_bt, cache, keys_b, **chosen)
    drawn = last_b[None], log_b[None]
    for _ in range(1, tokens, stretch):
        yield Drawn(*(np.asarray(drawn_kb)[:, : len(prompts)] for drawn_kb in drawn))
        *drawn, last_b, cache = _draw_on(params, last_b, cache, keys_b, stretch=stretch, **chosen)
    yield Drawn(*(np.asarray(drawn_kb)[:, : len(prompts)] for drawn_kb in drawn))


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


def step_shapes(decoder: Decoder, mesh: Mesh, batch: int, positions: int) -> tuple[Any, ...]:
    """Shapes and layouts of what `advance` takes to draw a token for each of a batch of sequences
    of so many positions."""
    shape, capacity = decoder.shape, rounded(positions)
    numbers_b = jax.ShapeDtypeStruct((batch,), jnp.int32)
    begun = functools.partial(_begin, decoder=decoder, capacity=capacity)
    keys_b, cache = jax.eval_shape(begun, np.uint32(0), numbers_b, numbers_b)
    params = jax.eval_shape(by_layer, parameter_shapes(shape, decoder.dtype))
    whole: Any = named_sharding(mesh, ())
    cached = jax.tree.map(lambda a: named_sharding(mesh, CACHE_AXES[-a.ndim :]), cache.layers)
    return jax.tree.map(
        lambda leaf, layout: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=layout),
        (params, jax.ShapeDtypeStruct((batch, 1), jnp.int32), cache, keys_b),
        (layer_shardings(shape, mesh), whole, Cache(cached, whole, whole), whole),
    )


def shards() -> int:
    """Into how many parts the mesh in context cuts a batch."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else batch_shards(mesh)


def rounded(positions: int) -> int:
    """To the next power of two, or three quarters of it where that is enough."""
    whole = max(_LEAST, 1 << (positions - 1).bit_length())
    return next(size for size in (3 * whole // 4, whole) if size >= positions)


@functools.partial(jax.jit, static_argnames=("decoder", "capacity"))
def _begin(
    seed: jax.Array, numbers_b: jax.Array, begins_b: jax.Array, *, decoder: Decoder, capacity: int
) -> tuple[jax.Array, Cache]:
    """The keys with which each prompt's tokens are drawn, and where it is remembered."""
    keys_b = jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(seed)))(numbers_b)
    return keys_b, empty_cache(decoder.shape, capacity, begins_b, decoder.dtype)


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
    hidden_btd, cache = extend(decoder, params, tokens_bt, cache)
    logits_bv = project(hidden_btd[:, -1], params, decoder.shape.padded_vocab)
    logits_bv = constrain(logits_bv, "batch", "vocab")  # so that they are gathered, not the head
    logits_bv = constrain(logits_bv[:, :vocab_size], "batch", None)
    positions_b = cache.length - cache.begins
    keys_b = jax.vmap(jax.random.fold_in)(keys_b, positions_b)
    token_b = jax.vmap(functools.partial(draw, sampling=sampling))(logits_bv, keys_b)
    log_bv = jax.nn.log_softmax(logits_bv)
    log_b = jnp.take_along_axis(log_bv, token_b[:, None], axis=1)[:, 0]
    return constrain(token_b.astype(jnp.int32), None), constrain(log_b, None), cache


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
