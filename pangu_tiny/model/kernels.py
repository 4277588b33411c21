"""What the platform decides: the back ends of attention, and products as each wants them.

Axes: b batch, t query position, s key position, h query heads, n key-value heads,
g = h / n query heads per key-value head, k head_dim.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel,
    splash_attention_mask,
)

from pangu_tiny.errors import check_one_of
from pangu_tiny.topology.mesh import partition_spec


def attention(
    q_bthk: jax.Array,
    k_bsnk: jax.Array,
    v_bsnk: jax.Array,
    segments_bt: jax.Array,
    backend: str,
) -> jax.Array:
    """softmax(q·k)·v over the earlier positions of the same segment.

    Args:
      q_bthk: queries, divided by √head_dim; h is a multiple of the n heads of `k_bsnk` and
        `v_bsnk`.
      segments_bt: int32; position t sees position s ≤ t if their segments are equal.
      backend: one of `BACKENDS`.

    Returns:
      [b, t, h, k] in the dtype of the queries; the softmax is taken in float32.
    """
    q_bthk, k_bsnk, v_bsnk = (
        jax.ad_checkpoint.checkpoint_name(x, INPUTS) for x in (q_bthk, k_bsnk, v_bsnk)
    )
    output_bthk = lookup(backend)(q_bthk, k_bsnk, v_bsnk, segments_bt)
    if backend.startswith("splash"):  # which names what it saves itself
        return output_bthk
    return jax.ad_checkpoint.checkpoint_name(output_bthk, OUTPUT)


def lookup(backend: str) -> Callable[..., jax.Array]:
    """The back end of that name."""
    check_one_of("Hardware.attention", backend, BACKENDS)
    return BACKENDS[backend]


def causal_mask(segments_bt: jax.Array) -> jax.Array:
    """[b, t, s], true where t may see s."""
    length = segments_bt.shape[1]
    earlier_ts = jnp.tril(jnp.ones((length, length), bool))
    return earlier_ts & (segments_bt[:, :, None] == segments_bt[:, None, :])


def _reference(q_bthk, k_bsnk, v_bsnk, segments_bt):
    """The plain formula; makes the whole square of scores."""
    b, t, h, k = q_bthk.shape
    n = k_bsnk.shape[2]
    q_btngk = q_bthk.reshape(b, t, n, h // n, k)
    scores = jnp.einsum("btngk,bsnk->bngts", q_btngk, k_bsnk, preferred_element_type=jnp.float32)
    mask_b11ts = causal_mask(segments_bt)[:, None, None]
    scores = jnp.where(mask_b11ts, scores, jnp.finfo(jnp.float32).min)
    weights_bngts = jax.nn.softmax(scores, axis=-1).astype(q_bthk.dtype)
    return jnp.einsum("bngts,bsnk->btngk", weights_bngts, v_bsnk).reshape(b, t, h, k)


def _dot_product(q_bthk, k_bsnk, v_bsnk, segments_bt, implementation=None):
    """`jax.nn.dot_product_attention`, which knows segments only as a mask."""
    mask_b1ts = causal_mask(segments_bt)[:, None]
    return jax.nn.dot_product_attention(
        q_bthk, k_bsnk, v_bsnk, mask=mask_b1ts, scale=1.0, implementation=implementation
    )


def _cudnn(q_bthk, k_bsnk, v_bsnk, segments_bt):
    """cuDNN's kernel, which takes 16-bit numbers, and heads of a multiple of 8; for others XLA's
    own choice."""
    taken = q_bthk.dtype in (jnp.bfloat16, jnp.float16) and q_bthk.shape[-1] % 8 == 0
    implementation = "cudnn" if taken else None
    return _dot_product(q_bthk, k_bsnk, v_bsnk, segments_bt, implementation)


def _blocked(q_bthk, k_bsnk, v_bsnk, segments_bt, block=64):
    """For CPUs: query rows in blocks, each against its own past only, so that half of the square
    is never computed and the other half never exists at once."""
    b, t, h, k = q_bthk.shape
    n = k_bsnk.shape[2]
    q_bhtk = jnp.swapaxes(q_bthk, 1, 2)
    k_bnsk, v_bnsk = jnp.swapaxes(k_bsnk, 1, 2), jnp.swapaxes(v_bsnk, 1, 2)
    mixed = []
    for start in range(0, t, block):
        end = min(start + block, t)
        q_bnqk = q_bhtk[:, :, start:end].reshape(b, n, -1, k)  # the heads of a group as more rows
        scores = jnp.einsum(
            "bnqk,bnsk->bnqs", q_bnqk, k_bnsk[:, :, :end], preferred_element_type=jnp.float32
        )
        earlier_qs = jnp.arange(start, end)[:, None] >= jnp.arange(end)
        same_bqs = segments_bt[:, start:end, None] == segments_bt[:, None, :end]
        mask_b1qs = (earlier_qs & same_bqs)[:, None]
        scores = scores.reshape(b, h, end - start, end)
        scores = jnp.where(mask_b1qs, scores, jnp.finfo(jnp.float32).min)
        weights = jax.nn.softmax(scores, axis=-1).astype(q_bthk.dtype).reshape(b, n, -1, end)
        mixed_bnqk = jnp.einsum("bnqs,bnsk->bnqk", weights, v_bnsk[:, :, :end])
        mixed.append(mixed_bnqk.reshape(b, h, end - start, k))
    return jnp.swapaxes(jnp.concatenate(mixed, axis=2), 1, 2)


INPUTS, OUTPUT = "attention_inputs", "attention_output"
"""What a rematerialisation policy calls that which the backward pass needs of attention: queries,
keys and values as they are attended to, and the output with, of fused kernels, the normalisers."""

_BLOCKS = (1024, 512, 256)


def splash_block(length: int) -> int:
    """Rows and columns of the blocks that splash attention takes: the largest that divide the
    sequence, as counted by `plan`; 128, its own default, takes five times as many cycles."""
    return next((block for block in _BLOCKS if length % block == 0), 128)


def _splash(q_bthk, k_bsnk, v_bsnk, segments_bt, interpret=False):
    """Pallas' splash attention for TPUs, which never makes the square and skips its upper half.

    A kernel is not partitioned by the compiler: each device runs it on its batch and heads.
    """

    def local(q_bthk, k_bsnk, v_bsnk, segments_bt):
        length, heads = q_bthk.shape[1:3]
        causal = splash_attention_mask.CausalMask((length, length))
        names = [field.name for field in dataclasses.fields(splash_attention_kernel.BlockSizes)]
        block = splash_block(length)
        blocks = {name: block for name in names if name.startswith("block_")}
        kernel = splash_attention_kernel.make_splash_mha_single_device(
            splash_attention_mask.MultiHeadMask([causal] * heads),
            block_sizes=splash_attention_kernel.BlockSizes(**blocks),
            residual_checkpoint_name=OUTPUT,
            interpret=interpret,
        )
        segments = splash_attention_kernel.SegmentIds(q=segments_bt, kv=segments_bt)
        out_bhtk = jax.vmap(kernel)(
            jnp.swapaxes(q_bthk, 1, 2),
            jnp.swapaxes(k_bsnk, 1, 2),
            jnp.swapaxes(v_bsnk, 1, 2),
            segments,
        )
        return jnp.swapaxes(out_bhtk, 1, 2).astype(q_bthk.dtype)

    if jax.sharding.get_abstract_mesh().empty:
        return local(q_bthk, k_bsnk, v_bsnk, segments_bt)
    heads_spec = partition_spec(("batch", None, "heads", None))
    kv_spec = partition_spec(("batch", None, "kv_heads", None))
    return jax.shard_map(
        local,
        in_specs=(heads_spec, kv_spec, kv_spec, partition_spec(("batch", None))),
        out_specs=heads_spec,
        check_vma=False,
    )(q_bthk, k_bsnk, v_bsnk, segments_bt)


BACKENDS: dict[str, Callable[..., jax.Array]] = {
    "reference": _reference,
    "blocked": _blocked,
    "dot_product": _dot_product,
    "cudnn": _cudnn,
    "splash": _splash,
    "splash_interpret": functools.partial(_splash, interpret=True),
}
"""reference: the formula. blocked: for CPUs. dot_product: XLA's own choice. cudnn: fused, on
NVIDIA GPUs, in bfloat16. splash: fused, on TPUs. splash_interpret: the same kernel step by step on
any device, for tests."""


def weight_gradient(x: jax.Array, d_out: jax.Array, axes: int, dtype: Any) -> jax.Array:
    """The gradient, in `dtype`, of the kernel in x·kernel, a sum over the last `axes` axes of x.

    It is spelled out for the CPU: XLA's fast product there wants two axes, and the one that it sums
    over last on the left; left to itself it fuses the transpose of x into whatever computes x,
    which is several times slower than a copy.
    """
    positions = tuple(range(x.ndim - axes))

    def in_two_axes(x, d_out):
        rows = math.prod(x.shape[: len(positions)])
        flat_x, flat_out = x.reshape(rows, -1), d_out.reshape(rows, -1)
        product = jnp.matmul(transposed(flat_x), flat_out, preferred_element_type=dtype)
        return product.reshape(*x.shape[len(positions) :], *d_out.shape[len(positions) :])

    def in_all_axes(x, d_out):
        summed = ((positions, positions), ((), ()))
        return jax.lax.dot_general(x, d_out, summed, preferred_element_type=dtype)

    return jax.lax.platform_dependent(x, d_out, cpu=in_two_axes, default=in_all_axes)


def transposed(x_nd: jax.Array) -> jax.Array:
    """x.T; on a CPU as a copy of its own, whatever the compiler thinks."""
    return jax.lax.platform_dependent(
        x_nd, cpu=lambda x: jax.lax.optimization_barrier(x.T), default=lambda x: x.T
    )


def rotate(x_bthk: jax.Array, cos_bt1k: jax.Array, sin_bt1k: jax.Array) -> jax.Array:
    """Turns the pairs (i, i + head_dim / 2) by angles whose cosines and sines, float32, come twice;
    see `layers.apply_rope`."""
    return jax.lax.platform_dependent(
        x_bthk, cos_bt1k, sin_bt1k, tpu=rotate_by_product, default=rotate_by_halves
    )


def rotate_by_halves(x_bthk, cos_bt1k, sin_bt1k):
    half = x_bthk.shape[-1] // 2
    cos, sin = cos_bt1k[..., :half], sin_bt1k[..., :half]
    first, second = jnp.split(x_bthk.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x_bthk.dtype)


def rotate_by_product(x_bthk, cos_bt1k, sin_bt1k):
    """A TPU works on 128 lanes at once and cannot well take 64 of them: the halves change places by
    a product with a signed permutation, which is exact."""
    half = x_bthk.shape[-1] // 2
    swap_kk = np.roll(np.eye(2 * half, dtype=x_bthk.dtype), half, axis=1)
    swap_kk[half:] *= -1  # the second half goes to the first with a minus
    swapped_bthk = jnp.matmul(
        x_bthk, swap_kk, precision="highest", preferred_element_type=jnp.float32
    )
    turned = x_bthk.astype(jnp.float32) * cos_bt1k + swapped_bthk * sin_bt1k
    return turned.astype(x_bthk.dtype)
