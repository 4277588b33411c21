"""The draw of a token from logits, and its settings. Axes: v vocabulary."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pangu_tiny.errors import check_number


class Sampling(NamedTuple):
    """How a token is drawn.

    Attributes:
      temperature: 0 takes the likeliest token, 1 the model's distribution.
      top_k: draw among the k likeliest; 0 is all.
      top_p: draw among the fewest tokens that have this probability together; 1 is all.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def check(self) -> None:
        """Refuses settings out of range."""
        check_number("generate.temperature", self.temperature, 0)
        check_number("generate.top_k", self.top_k, 0)
        check_number("generate.top_p", self.top_p, above=0, most=1)


GREEDY = Sampling()


def draw(logits_v: jax.Array, key: jax.Array, sampling: Sampling) -> jax.Array:
    """One id from float32 logits: the likeliest at temperature 0, else drawn among those that
    both top_k and top_p leave."""
    if sampling.temperature == 0:
        return jnp.argmax(logits_v)
    logits_v = logits_v / sampling.temperature
    order_v = jnp.argsort(logits_v, descending=True)
    ranked_v = logits_v[order_v]
    before_v = jnp.cumsum(jax.nn.softmax(ranked_v)) - jax.nn.softmax(ranked_v)
    kept_v = before_v < sampling.top_p
    if sampling.top_k:
        kept_v &= jnp.arange(len(ranked_v)) < min(sampling.top_k, len(ranked_v))
    kept_v = kept_v.at[0].set(True)
    return order_v[jax.random.categorical(key, jnp.where(kept_v, ranked_v, -jnp.inf))]
