"""The stage `generate`: text from a checkpoint, token by token, with a key-value cache.

Axes: v vocabulary.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pangu_tiny.checkpoints.read import Checkpoint, open_checkpoint
from pangu_tiny.errors import UserError
from pangu_tiny.model.decoder import Cache, Decoder, empty_cache, project
from pangu_tiny.tokenizer.model import Tokenizer
from pangu_tiny.tokenizer.tokenizer_json import TokenizerJson
from pangu_tiny.topology import processes
from pangu_tiny.workdir import claim, write_atomically

_CACHE_MULTIPLE = 64  # so that prompts of about the same length share a compiled step


def generate(
    checkpoint: str,
    prompt: str = "",
    tokens: int = 200,
    temperature: float = 0.8,
    top_k: int = 0,
    top_p: float = 0.95,
    seed: int = 0,
    workdir: str | None = None,
) -> str:
    """Continues a prompt and prints the text as it comes.

    Args:
      checkpoint: a train workdir or a step in it.
      prompt: text to continue; may be empty.
      tokens: how many to add at most; an end mark ends earlier.
      temperature: 0 takes the likeliest token, 1 the model's distribution.
      top_k: draw among the k likeliest; 0 is all.
      top_p: draw among the fewest tokens that have this probability together; 1 is all.
      seed: of the draws.
      workdir: where `generated.txt` goes; None only prints.

    Returns:
      Prompt and continuation.

    Raises:
      UserError: no checkpoint there, a setting out of range, or a workdir of another text.
    """
    if processes.several():
        raise UserError(f"generate runs in one process, found {processes.count()}")
    if tokens < 0:
        raise UserError(f"generate.tokens is {tokens}, expected 0 or more")
    if not 0 <= seed < 2**32:
        raise UserError(f"generate.seed is {seed}, expected from 0 to 2**32 - 1")
    check_sampling(temperature, top_k, top_p)
    opened = open_checkpoint(checkpoint)
    tokenizer = opened.tokenizer()
    begin_id, end_id = opened.about["begin_id"], opened.about["end_id"]
    begin = [] if begin_id is None else [begin_id]
    ids = begin + _encode(tokenizer, prompt, opened)
    if not ids:
        raise UserError(
            f"generate.prompt is empty and checkpoint {opened.path} has no begin mark: expected"
            " some text"
        )
    longest = opened.about["sequence_length"]
    if len(ids) + tokens > longest:
        raise UserError(
            f"generate.prompt has {len(ids)} tokens and generate.tokens is {tokens}: the model "
            f"was trained on sequences of {longest}"
        )
    settings = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
    if workdir is not None:
        source = {"checkpoint": opened.about["identity"], "step": opened.about["step"]}
        asked = {"prompt": prompt, "tokens": tokens, **settings}
        folder = claim(workdir, "generate", source | asked)
    decoder = Decoder(opened.shape)
    drawn = sample(
        decoder,
        opened.params(),
        ids,
        tokens,
        **settings,
        end_id=end_id,
        vocab_size=min(tokenizer.vocab_size, opened.shape.vocab_size),
    )
    # The prompt as it was given, and as it decodes, which differ where a normaliser changed it.
    text, shown = prompt, tokenizer.decode(ids[len(begin) :])
    print(prompt, end="", flush=True)
    for token in drawn:
        ids.append(token)
        longer = tokenizer.decode(ids[len(begin) :])
        if not longer.endswith("\N{REPLACEMENT CHARACTER}"):  # the bytes of a character still come
            print(longer[len(shown) :], end="", flush=True)
            text, shown = text + longer[len(shown) :], longer
    print()
    if workdir is not None:
        write_atomically(folder / "generated.txt", text)
    return text


def _encode(tokenizer: Tokenizer | TokenizerJson, prompt: str, opened: Checkpoint) -> list[int]:
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"generate.prompt {prompt!r} is not text: {error}") from error
    ids = tokenizer.encode(prompt)
    rows = opened.shape.vocab_size
    if (largest := max(ids, default=0)) >= rows:
        raise UserError(
            f"checkpoint {opened.path} has {rows:,} ids, but its tokenizer makes id {largest:,} of"
            " generate.prompt: it is another model's, expected its own"
        )
    return ids


def check_sampling(temperature: float, top_k: int, top_p: float) -> None:
    """Refuses settings out of range."""
    if temperature < 0:
        raise UserError(f"generate.temperature is {temperature}, expected 0 or more")
    if top_k < 0:
        raise UserError(f"generate.top_k is {top_k}, expected 0 (all) or more")
    if not 0 < top_p <= 1:
        raise UserError(f"generate.top_p is {top_p}, expected more than 0 and at most 1")


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
    capacity = -(-(len(prompt_ids) + tokens) // _CACHE_MULTIPLE) * _CACHE_MULTIPLE
    cache = empty_cache(decoder.shape, 1, capacity, decoder.dtype)
    feed = jnp.asarray([prompt_ids], jnp.int32)
    for key in jax.random.split(jax.random.key(seed), tokens):
        token, cache = _advance(params, feed, cache, key, **settings)
        if end_id is not None and int(token) == end_id:
            return
        yield int(token)
        feed = token[None, None]


@functools.partial(
    jax.jit,
    static_argnames=("decoder", "vocab_size", "temperature", "top_k", "top_p"),
    donate_argnames="cache",
)
def _advance(
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
    hidden_btd, cache = decoder.apply({"params": params}, tokens_1t, cache=cache)
    logits_v = project(hidden_btd[:, -1], params, vocab_size)[0]
    return draw(logits_v, key, temperature, top_k, top_p), cache


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
