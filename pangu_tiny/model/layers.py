"""The layers of a block: RMSNorm, RoPE, SwiGLU with the series activation, augmented shortcut.

Axes: b batch, t position, d width, h heads, k head_dim, f ffn width, n series terms, r bottleneck.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn

from pangu_tiny.model.init import matrix_init, series_scale_init
from pangu_tiny.topology.mesh import constrain


@jax.custom_vjp
def matmul(x_nd: jax.Array, kernel: jax.Array) -> jax.Array:
    """x·kernel, in the dtype of x.

    The gradient of x is in the dtype of x too. That of the kernel is summed in the kernel's, which
    is float32: over positions here, and over the devices that share a batch.

    It is spelled out for the CPU as well: XLA's fast product there wants two axes, and the one
    that it sums over last on the left; left to itself it fuses the transpose of x into whatever
    computes x, which is several times slower than a copy.

    Args:
      x_nd: any axes before the last.
      kernel: any axes; the first of them, together d long, are summed over.

    Returns:
      [n, e], e being the product of the other axes of the kernel.
    """
    return _product(x_nd, kernel)


def _matrix(kernel, x_nd):
    return kernel.reshape(x_nd.shape[-1], -1).astype(x_nd.dtype)


def _product(x_nd, kernel):
    flat_ne = x_nd.reshape(-1, x_nd.shape[-1]) @ _matrix(kernel, x_nd)
    return flat_ne.reshape(*x_nd.shape[:-1], -1)


def _matmul_forward(x_nd, kernel):  # not by `matmul`, into which no remat policy looks
    return _product(x_nd, kernel), (x_nd, kernel)


def _matmul_backward(saved, d_out_ne):
    x_nd, kernel = saved
    flat_nd = x_nd.reshape(-1, x_nd.shape[-1])
    flat_ne = d_out_ne.reshape(-1, d_out_ne.shape[-1])
    d_x_nd = flat_ne @ _matrix(kernel, x_nd).T
    d_kernel = jnp.matmul(transposed(flat_nd), flat_ne, preferred_element_type=kernel.dtype)
    return d_x_nd.reshape(x_nd.shape), d_kernel.reshape(kernel.shape)


matmul.defvjp(_matmul_forward, _matmul_backward)


def transposed(x_nd: jax.Array) -> jax.Array:
    """x.T; on a CPU as a copy of its own, whatever the compiler thinks."""
    return jax.lax.platform_dependent(
        x_nd, cpu=lambda x: jax.lax.optimization_barrier(x.T), default=lambda x: x.T
    )


def record(
    module: nn.Module, name: str, figure: Callable[[], jax.Array], collection: str = "measured"
) -> None:
    """Records a statistic if the caller made `collection` mutable; otherwise computes nothing."""
    if module.is_mutable_collection(collection) and not module.is_initializing():
        module.sow(collection, name, figure(), init_fn=lambda: None, reduce_fn=lambda _, new: new)


def mean_size(x_btc: jax.Array) -> jax.Array:
    """Mean absolute value of each channel, float32."""
    return jnp.mean(jnp.abs(x_btc.astype(jnp.float32)), axis=(0, 1))


def gram(x_btf: jax.Array) -> jax.Array:
    """Mean over the positions of the product of every two channels, float32 [f, f]."""
    x_nf = x_btf.reshape(-1, x_btf.shape[-1])
    products_ff = jnp.matmul(
        transposed(x_nf), x_nf, precision="highest", preferred_element_type=jnp.float32
    )
    return products_ff / len(x_nf)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) · scale, computed in float32, returned in the dtype of x.

    Recorded, of each channel: `square`, the mean of x², and `size`, the mean of |output|.
    """

    eps: float

    @nn.compact
    def __call__(self, x_btd: jax.Array) -> jax.Array:
        scale_d = self.param("scale", nn.initializers.ones, x_btd.shape[-1:])
        x32_btd = x_btd.astype(jnp.float32)
        mean_bt1 = jnp.mean(jnp.square(x32_btd), axis=-1, keepdims=True)
        normed_btd = x32_btd * jax.lax.rsqrt(mean_bt1 + self.eps) * scale_d
        record(self, "square", lambda: jnp.mean(jnp.square(x32_btd), axis=(0, 1)))
        record(self, "size", lambda: mean_size(normed_btd))
        return normed_btd.astype(x_btd.dtype)


def rope_tables(length: int, head_dim: int, theta: float) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine, float32 [length, 1, head_dim / 2], of the rotary angles at 0 … length − 1.

    Precomputed, to be looked up by position: XLA would otherwise compute the sine anew at every
    use.
    """
    exponents = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
    angles = jnp.arange(length, dtype=jnp.float32)[:, None, None] / theta**exponents
    return jnp.cos(angles), jnp.sin(angles)


def apply_rope(x_bthk: jax.Array, tables: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Turns the pairs (i, i + head_dim / 2), the half-split layout of Hugging Face's LLaMA.

    Args:
      tables: cosine and sine [b, t, 1, head_dim / 2] at the positions of x.
    """
    cos, sin = tables
    first, second = jnp.split(x_bthk.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x_bthk.dtype)


def series_silu(gate_btf: jax.Array, scale_nf: jax.Array, bias_nf: jax.Array) -> jax.Array:
    """φ(g) = Σᵢ SiLU(aᵢ ⊙ g + bᵢ), per channel (P2 eq. 7 with SiLU as every σᵢ).

    P2 does not state the base activation, nor whether a and b are per channel, nor where the sum
    sits in a SwiGLU: chosen on the gate and per channel, since that is what makes n = 2 as cheap
    as P2 measures it. a ⊙ g + b is taken in the dtype of a and b, and so are their gradients,
    which are sums over all positions.
    """
    terms = [
        jax.nn.silu(_affine(gate_btf, scale_f, bias_f))
        for scale_f, bias_f in zip(scale_nf, bias_nf, strict=True)
    ]
    return sum(terms[1:], terms[0])


@functools.partial(jax.checkpoint, prevent_cse=False)  # keeps the gate in its own dtype
def _affine(gate_btf, scale_f, bias_f):
    return (gate_btf.astype(scale_f.dtype) * scale_f + bias_f).astype(gate_btf.dtype)


class FeedForward(nn.Module):
    """(φ(x·gate) ⊙ x·up)·down, with φ = SiLU for series_terms = 1.

    Recorded: `size`, the mean size of each neuron; among "grams", `gram` of the neurons.
    """

    ffn_width: int
    series_terms: int

    @nn.compact
    def __call__(self, x_btd: jax.Array) -> jax.Array:
        width, inner = x_btd.shape[-1], self.ffn_width
        gate_df = self.param("gate", matrix_init, (width, inner))
        up_df = self.param("up", matrix_init, (width, inner))
        down_fd = self.param("down", matrix_init, (inner, width))
        gate_btf = constrain(matmul(x_btd, gate_df), "batch", None, "ffn")
        up_btf = constrain(matmul(x_btd, up_df), "batch", None, "ffn")
        if self.series_terms > 1:
            terms = (self.series_terms, inner)
            scale_nf = self.param("series_scale", series_scale_init, terms)
            bias_nf = self.param("series_bias", nn.initializers.zeros, terms)
            active_btf = series_silu(gate_btf, scale_nf, bias_nf)
        else:
            active_btf = jax.nn.silu(gate_btf)
        neurons_btf = active_btf * up_btf
        record(self, "size", lambda: mean_size(neurons_btf))
        record(self, "gram", lambda: gram(neurons_btf), "grams")
        return matmul(neurons_btf, down_fd)


class AugmentedShortcut(nn.Module):
    """B·GELU(A·x): a branch beside attention that mixes no positions (P2 eq. 5, bottleneck form).

    P2 states neither the initialisation nor what the branch reads: chosen to read the normed
    input, with A random and B zero, so that training starts at the plain block. GELU in its tanh
    form, which is cheaper and differs by less than 1e-3.

    Recorded: `size`, the mean size of each inner channel.
    """

    bottleneck: int

    @nn.compact
    def __call__(self, x_btd: jax.Array) -> jax.Array:
        width = x_btd.shape[-1]
        down_dr = self.param("down", matrix_init, (width, self.bottleneck))
        up_rd = self.param("up", nn.initializers.zeros, (self.bottleneck, width))
        hidden_btr = jax.nn.gelu(matmul(x_btd, down_dr), approximate=True)
        record(self, "size", lambda: mean_size(hidden_btr))
        return matmul(hidden_btr, up_rd)
