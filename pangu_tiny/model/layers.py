"""The layers of a block: RMSNorm, RoPE, SwiGLU with the series activation, augmented shortcut.

Axes: b batch, t position, d width, h heads, k head_dim, f ffn width, n series terms, r bottleneck.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from pangu_tiny.model.init import matrix_init, series_scale_init
from pangu_tiny.model.kernels import rotate, transposed, weight_gradient
from pangu_tiny.topology.mesh import constrain, mesh_axes, partition_spec
from pangu_tiny.topology.reduction import reduce_gradient

HIDDEN = "hidden"
"""What a rematerialisation policy calls the products within the feed-forward and the shortcut."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def tensordot(x: jax.Array, kernel: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
    """x·kernel, in the dtype of x: a sum over "embed", or over all axes of the kernel but it.

    The gradient of x is in the dtype of x too. That of the kernel is summed in the kernel's, which
    is float32: over positions here, and over the devices that share a batch.

    Every axis stays one of its own (heads and head_dim are not made one): whoever reads the product
    then decides how it lies in memory, and nothing is copied to turn it.

    Args:
      x: [b, t, …]; what follows are the axes that are summed over.
      axes: the logical axes of the kernel, "embed" the first, which is then summed over, or the
        last.
    """
    return _product(x, kernel, axes)


def _summed(axes):
    """How many axes are summed over: the last of x, the first of the kernel."""
    return 1 if axes[0] == "embed" else len(axes) - 1


def _product(x, kernel, axes):
    return jnp.tensordot(x, kernel.astype(x.dtype), _summed(axes))


def _forward(x, kernel, axes):
    return _product(x, kernel, axes), (x, kernel)


def _backward(axes, saved, d_out):
    x, kernel = saved
    left = tuple(range(_summed(axes), kernel.ndim))
    last = tuple(range(d_out.ndim - len(left), d_out.ndim))
    d_x = jax.lax.dot_general(d_out, kernel.astype(x.dtype), ((last, left), ((), ())))
    return d_x, _gradient(x, d_out, axes, kernel.dtype)


def _gradient(x, d_out, axes, dtype):
    """Of the kernel: on each device from its sequences, then summed over devices."""
    summed = _summed(axes)
    if jax.sharding.get_abstract_mesh().empty:
        return weight_gradient(x, d_out, summed, dtype)

    batch = mesh_axes("batch")

    def local(x, d_out):
        partial = weight_gradient(x, d_out, summed, dtype)
        return reduce_gradient(partial, axes.index("embed"), batch)

    def layout(kernel_axes):  # of an activation, whose width is nowhere cut
        return partition_spec(
            ("batch", None, *(None if axis == "embed" else axis for axis in kernel_axes))
        )

    return jax.shard_map(
        local,
        in_specs=(layout(axes[:summed]), layout(axes[summed:])),
        out_specs=partition_spec(axes),
        check_vma=False,
    )(x, d_out)


tensordot.defvjp(_forward, _backward)


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


def rope_tables(positions: jax.Array, head_dim: int, theta: float) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine, float32 [*positions, 1, head_dim], of the rotary angles: those of
    head_dim / 2 pairs, twice.

    XLA computes the sine anew at every use of it. Where the uses are many, tables of all positions
    are made, and looked up.
    """
    exponents = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
    angles = jnp.asarray(positions, jnp.float32)[..., None, None] / theta**exponents
    return jnp.tile(jnp.cos(angles), 2), jnp.tile(jnp.sin(angles), 2)


@jax.custom_vjp
def apply_rope(x_bthk: jax.Array, tables: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Turns the pairs (i, i + head_dim / 2), the half-split layout of Hugging Face's LLaMA.

    Its gradient is turned back by the same angle.

    Args:
      tables: cosine and sine [b, t, 1, head_dim] at the positions of x; a factor in both of them
        scales x.
    """
    return rotate(x_bthk, *tables)


apply_rope.defvjp(
    lambda x_bthk, tables: (rotate(x_bthk, *tables), tables),
    lambda tables, d_out_bthk: (rotate(d_out_bthk, tables[0], -tables[1]), None),
)


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
        gate_btf = constrain(tensordot(x_btd, gate_df, ("embed", "ffn")), "batch", None, "ffn")
        up_btf = constrain(tensordot(x_btd, up_df, ("embed", "ffn")), "batch", None, "ffn")
        gate_btf, up_btf = checkpoint_name(gate_btf, HIDDEN), checkpoint_name(up_btf, HIDDEN)
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
        return tensordot(neurons_btf, down_fd, ("ffn", "embed"))


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
        hidden_btr = checkpoint_name(tensordot(x_btd, down_dr, ("embed", None)), HIDDEN)
        hidden_btr = jax.nn.gelu(hidden_btr, approximate=True)
        record(self, "size", lambda: mean_size(hidden_btr))
        return tensordot(hidden_btr, up_rd, (None, "embed"))
