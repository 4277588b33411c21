"""The decoder: embedding, scanned blocks, final norm; the head is applied by whoever scores.

The parameter tree is part of the public format: a nested dict of float32 arrays, the blocks
stacked on axis 0, with the names and axes of `PARAMETER_AXES`. The leaves of the optional modules
(`shortcut`, `series_scale`, `series_bias`) and of an untied head are there or absent; absent means
the plain block and the transposed embedding table.

  out = x + attention(norm(x)) + shortcut(norm(x));  out = out + ffn(norm(out))

What is subtle elsewhere: layers record statistics where they are computed (`record`), which costs
nothing unless whoever applies the model asks for them, as rank-teacher does.

Axes: b batch, t position, d width, v padded vocabulary.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.ad_checkpoint import checkpoint_name

from pangu_tiny.errors import check_one_of
from pangu_tiny.model.attention import Attention
from pangu_tiny.model.init import apply_scheme, matrix_init
from pangu_tiny.model.kernels import INPUTS, OUTPUT, lookup
from pangu_tiny.model.layers import (
    HIDDEN,
    AugmentedShortcut,
    FeedForward,
    RMSNorm,
    record,
    rope_tables,
)
from pangu_tiny.model.shape import ModelShape
from pangu_tiny.topology.mesh import RULES, constrain, partition_spec

PARAMETER_AXES: dict[str, tuple[str, ...]] = {
    "embedding/table": ("vocab", "embed"),
    "blocks/attention_norm/scale": ("layer", "embed"),
    "blocks/attention/query": ("layer", "embed", "heads", "head_dim"),
    "blocks/attention/key": ("layer", "embed", "kv_heads", "head_dim"),
    "blocks/attention/value": ("layer", "embed", "kv_heads", "head_dim"),
    "blocks/attention/out": ("layer", "heads", "head_dim", "embed"),
    "blocks/shortcut/down": ("layer", "embed", "bottleneck"),
    "blocks/shortcut/up": ("layer", "bottleneck", "embed"),
    "blocks/ffn_norm/scale": ("layer", "embed"),
    "blocks/ffn/gate": ("layer", "embed", "ffn"),
    "blocks/ffn/up": ("layer", "embed", "ffn"),
    "blocks/ffn/down": ("layer", "ffn", "embed"),
    "blocks/ffn/series_scale": ("layer", "terms", "ffn"),
    "blocks/ffn/series_bias": ("layer", "terms", "ffn"),
    "final_norm/scale": ("embed",),
    "head/kernel": ("embed", "vocab"),
}
"""Name of a parameter → the logical axes that `topology/mesh.py` lays on the mesh."""

_USED_AS_FLOAT32 = ("scale", "series_scale", "series_bias")  # whatever the dtype of the decoder

Dtype = Any

_MIDDLE = "middle"  # of a block: the residual stream between attention and feed-forward

REMAT_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.save_only_these_names(INPUTS, OUTPUT, HIDDEN, _MIDDLE),
    "attention": jax.checkpoint_policies.save_only_these_names(OUTPUT),
}


class Block(nn.Module):
    """One layer, as the body of a scan that carries the residual stream.

    Recorded: `influence`, one less the mean cosine between what comes in and what goes out
    (block influence).
    """

    shape: ModelShape
    backend: str

    @nn.compact
    def __call__(self, x_btd, segments_bt, rope, cache=None):
        shape = self.shape
        normed_btd = RMSNorm(shape.norm_eps, name="attention_norm")(x_btd)
        mixed_btd, cache = Attention(shape, self.backend, name="attention")(
            normed_btd, segments_bt, rope, cache
        )
        if shape.bottleneck:
            mixed_btd += AugmentedShortcut(shape.bottleneck, name="shortcut")(normed_btd)
        before_btd = x_btd
        x_btd = checkpoint_name(constrain(x_btd + mixed_btd, "batch", None, None), _MIDDLE)
        normed_btd = RMSNorm(shape.norm_eps, name="ffn_norm")(x_btd)
        ffn = FeedForward(shape.ffn_width, shape.series_terms, name="ffn")
        out_btd = constrain(x_btd + ffn(normed_btd), "batch", None, None)
        record(self, "influence", lambda: 1 - jnp.mean(_cosine(before_btd, out_btd)))
        return out_btd, cache


def _cosine(x_btd: jax.Array, y_btd: jax.Array) -> jax.Array:
    x_btd, y_btd = x_btd.astype(jnp.float32), y_btd.astype(jnp.float32)
    lengths = jnp.linalg.norm(x_btd, axis=-1) * jnp.linalg.norm(y_btd, axis=-1)
    products = jnp.sum(x_btd * y_btd, axis=-1)
    return products / jnp.maximum(lengths, jnp.finfo(jnp.float32).tiny)  # 0 in rows of padding


class Decoder(nn.Module):
    """Token ids to the normed residual stream that the head reads.

    Attributes:
      shape: the sizes.
      dtype: of the matrix products and the residual stream; norms, softmax, loss and the gradients
        of parameters are float32.
      attention: back end, see `model/kernels.py`.
      remat: "none" or a key of `REMAT_POLICIES`.
      unroll: blocks per step of the scan; 0 means all.
    """

    shape: ModelShape
    dtype: Dtype = jnp.float32
    attention: str = "reference"
    remat: str = "none"
    unroll: int = 1

    def __post_init__(self):
        lookup(self.attention)
        _rematerialised(self.remat)
        super().__post_init__()

    @nn.compact
    def __call__(
        self,
        tokens_bt: jax.Array,
        segments_bt: jax.Array | None = None,
        positions_bt: jax.Array | None = None,
    ) -> jax.Array:
        """Runs the blocks.

        Args:
          tokens_bt: int32 ids below vocab_size.
          segments_bt: int32, no position sees another segment; None is one segment.
          positions_bt: int32 rotary positions, below t; None counts from 0.

        Returns:
          Hidden states [b, t, d] in `dtype`.
        """
        b, t = tokens_bt.shape
        if segments_bt is None:
            segments_bt = jnp.ones((b, t), jnp.int32)
        if positions_bt is None:
            positions_bt = jnp.broadcast_to(jnp.arange(t), (b, t))
        x_btd = Embedding(self.shape, self.dtype, name="embedding")(tokens_bt)
        x_btd = constrain(x_btd, "batch", None, None)
        tables = rope_tables(jnp.arange(t), self.shape.head_dim, self.shape.rope_theta)
        rope = tuple(table[positions_bt] for table in tables)
        stack = nn.scan(
            _rematerialised(self.remat),
            variable_axes={"params": 0, "measured": 0, "grams": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast, nn.broadcast),
            length=self.shape.depth,
            unroll=self.unroll or self.shape.depth,
        )(self.shape, self.attention, name="blocks")
        x_btd, _ = stack(x_btd, segments_bt, rope)
        if not self.shape.tied:
            Head(self.shape, name="head")()
        return RMSNorm(self.shape.norm_eps, name="final_norm")(x_btd)


class Embedding(nn.Module):
    """Ids to rows of the table in `dtype`.

    Each device looks up its columns of all rows of its replica, and so it sums their gradient. They
    are cast after the look-up, so that the gradient of a row is summed in float32, and while cut as
    the table is, so that devices exchange what is cast.
    """

    shape: ModelShape
    dtype: Dtype

    @nn.compact
    def __call__(self, tokens_bt: jax.Array) -> jax.Array:
        table_vd = self.param("table", matrix_init, (self.shape.padded_vocab, self.shape.width))
        if jax.sharding.get_abstract_mesh().empty or self.is_initializing():
            return table_vd[tokens_bt].astype(self.dtype)
        return jax.shard_map(
            functools.partial(_look_up, dtype=self.dtype),
            in_specs=(partition_spec(("vocab", "embed")), partition_spec(("replica", None))),
            out_specs=partition_spec(("replica", None, "embed")),
            check_vma=False,
        )(table_vd, tokens_bt)


def _look_up(table_vd: jax.Array, tokens_bt: jax.Array, dtype: Dtype) -> jax.Array:
    """On one device; ids whose rows lie on others are there found."""
    (axis,) = RULES["vocab"]
    if jax.lax.axis_size(axis) == 1:
        return table_vd[tokens_bt].astype(dtype)
    places_bt = tokens_bt - jax.lax.axis_index(axis) * len(table_vd)
    here_bt = (places_bt >= 0) & (places_bt < len(table_vd))
    rows_btd = table_vd[jnp.where(here_bt, places_bt, 0)]
    rows_btd = jnp.where(here_bt[..., None], rows_btd, 0.0).astype(dtype)
    return jax.lax.psum(rows_btd, axis)


class Head(nn.Module):
    shape: ModelShape

    @nn.compact
    def __call__(self) -> jax.Array:
        return self.param("kernel", matrix_init, (self.shape.width, self.shape.padded_vocab))


def _rematerialised(remat: str) -> type[Block]:
    check_one_of("Hardware.remat", remat, ("none", *REMAT_POLICIES))
    if remat == "none":
        return Block
    return nn.remat(Block, policy=REMAT_POLICIES[remat], prevent_cse=False)


def head_kernel(params: dict[str, Any]) -> jax.Array:
    """The matrix [d, v] that turns hidden states into logits, tied or not."""
    if "head" in params:
        return params["head"]["kernel"]
    return params["embedding"]["table"].T


def logits(decoder: Decoder, params: dict[str, Any], tokens_bt: jax.Array) -> jax.Array:
    """All logits at once, float32 [b, t, vocab_size], for small inputs."""
    hidden_btd: Any = decoder.apply({"params": params}, tokens_bt)
    return project(hidden_btd, params, decoder.shape.vocab_size)


def project(hidden_btd: jax.Array, params: dict[str, Any], vocab_size: int) -> jax.Array:
    """Hidden states to float32 logits over the real vocabulary, without its padding."""
    kernel_dv = head_kernel(params)[:, :vocab_size].astype(hidden_btd.dtype)
    return jnp.matmul(hidden_btd, kernel_dv, preferred_element_type=jnp.float32)


def init_params(shape: ModelShape, scheme: str, key: jax.Array) -> dict[str, Any]:
    """Random float32 parameters by one of the schemes of `model/init.py`."""
    params = Decoder(shape).init(key, jnp.zeros((1, 1), jnp.int32))["params"]
    return apply_scheme(params, scheme)


def parameter_shapes(shape: ModelShape, dtype: Dtype = jnp.float32) -> dict[str, Any]:
    """The parameter tree as `jax.ShapeDtypeStruct`s, without computing anything.

    Args:
      dtype: of those that a decoder of this dtype would cast wherever it uses them, so that it
        computes the same with them; the others stay float32.
    """
    return unflatten_dict(
        {
            name: leaf if name[-1] in _USED_AS_FLOAT32 else leaf.update(dtype=dtype)
            for name, leaf in _flat_shapes(shape).items()
        }
    )


@functools.cache
def _flat_shapes(shape: ModelShape) -> dict[tuple[str, ...], jax.ShapeDtypeStruct]:
    """Traced once: it takes a third of a second, and all that lays a model out asks for it."""
    params = jax.eval_shape(lambda: init_params(shape, "constant", jax.random.key(0)))
    return {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)  # whatever mesh is in context
        for name, leaf in flatten_dict(params).items()
    }


def parameter_axes(shape: ModelShape) -> dict[str, Any]:
    """The parameter tree with the logical axes of each leaf in its place."""
    present = flatten_dict(parameter_shapes(shape), sep="/")
    return unflatten_dict({name: PARAMETER_AXES[name] for name in present}, sep="/")
