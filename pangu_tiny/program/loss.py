"""Cross-entropy whose full logits never exist.

The positions are taken in chunks; the gradients with respect to hidden states and head are
computed in the forward pass, while a chunk's logits are at hand, so that nothing is computed
twice. Each device works on its part of the batch and of the vocabulary, and the head's gradient
is summed over devices once, after the last chunk.

Axes: b batch, t position, c position in a chunk, d width, v padded vocabulary.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pangu_tiny.model.kernels import transposed
from pangu_tiny.topology.mesh import constrain, mesh_axes, partition_spec
from pangu_tiny.topology.reduction import reduce_gradient


class Loss(NamedTuple):
    """What is minimised, and by position what has no gradient.

    Attributes:
      total: float32 scalar.
      nats_bt: float32, the negative log-likelihood of each target, weighted, without z-loss.
      likeliest_bt: bool, whether the target is the likeliest id.
    """

    total: jax.Array
    nats_bt: jax.Array
    likeliest_bt: jax.Array

    @property
    def rows_b(self) -> jax.Array:
        """Nats of each row."""
        return jnp.sum(self.nats_bt, axis=-1)


def cross_entropy(
    hidden_btd: jax.Array,
    kernel_dv: jax.Array,
    targets_bt: jax.Array,
    weights_bt: jax.Array,
    *,
    vocab_size: int,
    chunk: int,
    z_loss: float = 0.0,
) -> Loss:
    """Σ weight · (−log p(target) + z_loss · log²Z), summed over all positions.

    Args:
      hidden_btd: what the head reads, in the dtype of the matrix products.
      kernel_dv: the head; columns from vocab_size on are padding and never score.
      targets_bt: int32 ids.
      weights_bt: float32; 0 leaves a position out.
      vocab_size: number of real ids.
      chunk: tokens per device whose logits exist at one time.
      z_loss: weight of the squared log-normaliser, which keeps logits from drifting.
    """
    total, *by_position = _cross_entropy(
        hidden_btd, kernel_dv, targets_bt, weights_bt, vocab_size, chunk, z_loss
    )
    return Loss(total, *jax.lax.stop_gradient(by_position))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _cross_entropy(hidden_btd, kernel_dv, targets_bt, weights_bt, vocab_size, chunk, z_loss):
    inputs = (hidden_btd, kernel_dv, targets_bt, weights_bt)
    return _on_mesh(inputs, False, vocab_size=vocab_size, chunk=chunk, z_loss=z_loss)


def _forward(hidden_btd, kernel_dv, targets_bt, weights_bt, vocab_size, chunk, z_loss):
    inputs = (hidden_btd, kernel_dv, targets_bt, weights_bt)
    settings = {"vocab_size": vocab_size, "chunk": chunk, "z_loss": z_loss}
    total, nats_bt, likeliest_bt, *gradients = _on_mesh(inputs, True, **settings)
    return (total, nats_bt, likeliest_bt), gradients


def _backward(vocab_size, chunk, z_loss, gradients, cotangents):
    scale = cotangents[0]
    d_hidden_btd, d_kernel_dv = gradients
    return (scale * d_hidden_btd).astype(d_hidden_btd.dtype), scale * d_kernel_dv, None, None


_cross_entropy.defvjp(_forward, _backward)


@jax.named_scope("cross_entropy")
def _on_mesh(inputs, gradients, **settings):
    """Runs `_local` on each device's part; without a mesh in context, on everything."""
    hidden_btd, kernel_dv, *others = inputs
    # Still cut along d: it is to be gathered in the dtype in which it is used.
    matrix_dv = constrain(kernel_dv.astype(hidden_btd.dtype), "embed", "vocab")
    inputs = (hidden_btd, matrix_dv, *others)
    local = functools.partial(_local, gradients=gradients, **settings)
    if jax.sharding.get_abstract_mesh().empty:
        return local(*inputs, batch_axes=(), vocab_axes=())
    rows, hidden = partition_spec(("batch", None)), partition_spec(("batch", None, None))
    outputs = [partition_spec(()), rows, rows]
    if gradients:
        outputs += [hidden, partition_spec(("embed", "vocab"))]
    return jax.shard_map(
        functools.partial(local, batch_axes=mesh_axes("batch"), vocab_axes=mesh_axes("vocab")),
        in_specs=(hidden, partition_spec((None, "vocab")), rows, rows),
        out_specs=tuple(outputs),
        check_vma=False,
    )(*inputs)


def _local(
    hidden_btd,
    matrix_dv,
    targets_bt,
    weights_bt,
    *,
    vocab_size,
    chunk,
    z_loss,
    gradients,
    batch_axes,
    vocab_axes,
):
    b, t, d = hidden_btd.shape
    v = matrix_dv.shape[1]
    dtype = hidden_btd.dtype
    first_id = _position(vocab_axes) * v
    ids_v = first_id + jnp.arange(v)
    length = max(c for c in range(1, t + 1) if t % c == 0 and (c == 1 or b * c <= chunk))

    def one_chunk(d_kernel_dv, inputs):
        hidden_bcd, targets_bc, weights_bc = inputs
        logits_bcv = jnp.matmul(hidden_bcd, matrix_dv, preferred_element_type=jnp.float32)
        logits_bcv = jnp.where(ids_v < vocab_size, logits_bcv, -jnp.inf)
        peak_bc1 = _max(jnp.max(logits_bcv, axis=-1, keepdims=True), vocab_axes)
        powers_bcv = jnp.exp(logits_bcv - peak_bc1)
        sum_bc1 = _sum(jnp.sum(powers_bcv, axis=-1, keepdims=True), vocab_axes)
        log_z_bc = (peak_bc1 + jnp.log(sum_bc1))[..., 0]
        hit_bcv = targets_bc[..., None] == ids_v
        chosen_bc = _sum(jnp.sum(jnp.where(hit_bcv, logits_bcv, 0.0), axis=-1), vocab_axes)
        nll_bc = weights_bc * (log_z_bc - chosen_bc)
        total = jnp.sum(nll_bc) + z_loss * jnp.sum(weights_bc * jnp.square(log_z_bc))
        likeliest_bc = chosen_bc >= peak_bc1[..., 0]
        if not gradients:
            return d_kernel_dv, (total, nll_bc, likeliest_bc)
        pull_bc = weights_bc * (1.0 + 2.0 * z_loss * log_z_bc)
        d_logits_bcv = powers_bcv * (pull_bc[..., None] / sum_bc1)
        d_logits_bcv -= jnp.where(hit_bcv, weights_bc[..., None], 0.0)
        d_logits_bcv = d_logits_bcv.astype(dtype)
        d_hidden_bcd = _sum(d_logits_bcv @ matrix_dv.T, vocab_axes)
        d_kernel_dv += jnp.matmul(
            transposed(hidden_bcd.reshape(-1, d)),
            d_logits_bcv.reshape(-1, v),
            preferred_element_type=jnp.float32,
        )
        return d_kernel_dv, (total, nll_bc, likeliest_bc, d_hidden_bcd)

    def chunks(x):
        return jnp.swapaxes(x.reshape(b, t // length, length, *x.shape[2:]), 0, 1)

    def joined(x):
        return jnp.swapaxes(x, 0, 1).reshape(b, t, *x.shape[3:])

    start = jnp.zeros((d, v) if gradients else (), jnp.float32)
    inputs = tuple(map(chunks, (hidden_btd, targets_bt, weights_bt)))
    if length == t:
        d_kernel_dv, outputs = one_chunk(start, jax.tree.map(lambda x: x[0], inputs))
        outputs = jax.tree.map(lambda x: x[None], outputs)
    else:
        d_kernel_dv, outputs = jax.lax.scan(one_chunk, start, inputs)
    total, *by_position = outputs
    result = [_sum(jnp.sum(total), batch_axes), *map(joined, by_position)]
    if not gradients:
        return tuple(result)
    if batch_axes:
        d_kernel_dv = reduce_gradient(d_kernel_dv, 0, batch_axes)
    return *result, d_kernel_dv


def _sum(x, axes):
    return jax.lax.psum(x, axes) if axes else x


def _max(x, axes):
    return jax.lax.pmax(x, axes) if axes else x


def _position(axes):
    return jax.lax.axis_index(axes) if axes else 0
