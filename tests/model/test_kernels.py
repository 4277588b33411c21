"""Every attention back end against the formula in float64, on packed rows, with shared heads."""

import dataclasses
import functools
import math

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from shapes import TINY, random_params

from pangu_tiny.errors import UserError
from pangu_tiny.model.decoder import Decoder
from pangu_tiny.model.kernels import (
    BACKENDS,
    attention,
    lookup,
    rotate_by_halves,
    rotate_by_product,
    weight_gradient,
)


def backends(**not_here):
    """All, with what some of them need that is not here."""
    skip = {name: pytest.mark.skip(reason=f"needs {what}") for name, what in not_here.items()}
    return [pytest.param(name, marks=skip.get(name, ())) for name in BACKENDS]


IN_FLOAT32 = backends(splash="a TPU")
IN_BFLOAT16 = backends(splash="a TPU", cudnn="an NVIDIA GPU")

# Two rows of documents. 128 is the smallest length for the blocks of the splash kernel, 65 + 63
# puts a document's end inside of a block of the others.
LENGTH, HEADS, KV_HEADS, HEAD_DIM = 128, 4, 2, 8
DOCUMENTS = ((65, 1, 62), (3, 125))
RANDOM = np.random.default_rng(0)
Q = RANDOM.normal(size=(2, LENGTH, HEADS, HEAD_DIM)) / math.sqrt(HEAD_DIM)
K, V = RANDOM.normal(size=(2, 2, LENGTH, KV_HEADS, HEAD_DIM))
PULL = RANDOM.normal(size=Q.shape)
SEGMENTS = np.stack([np.repeat(np.arange(1, len(row) + 1), row) for row in DOCUMENTS])


def formula(q_thk, k_snk, v_snk):
    """Causal attention of one document, in float64 and plain loops."""
    mixed_thk = np.empty_like(q_thk)
    group = q_thk.shape[1] // k_snk.shape[1]
    for t, h in np.ndindex(q_thk.shape[:2]):
        scores_s = k_snk[: t + 1, h // group] @ q_thk[t, h]
        weights_s = np.exp(scores_s - scores_s.max())
        mixed_thk[t, h] = weights_s / weights_s.sum() @ v_snk[: t + 1, h // group]
    return mixed_thk


@functools.cache
def expected():
    mixed = np.empty_like(Q)
    for row, lengths in enumerate(DOCUMENTS):
        start = 0
        for length in lengths:
            piece = (row, slice(start, start + length))
            mixed[piece] = formula(Q[piece], K[piece], V[piece])
            start += length
    return mixed


def run(backend, dtype=jnp.float32):
    """The output on the packed rows, and the gradients of Σ pull · output."""

    @jax.jit
    def both(q, k, v, pull, segments):
        mixed, back = jax.vjp(lambda *qkv: attention(*qkv, segments, backend), q, k, v)
        return mixed, back(pull)

    inputs = (jnp.asarray(x, dtype) for x in (Q, K, V, PULL))
    return both(*inputs, jnp.asarray(SEGMENTS, jnp.int32))


@functools.cache
def reference():
    return run("reference")


@pytest.mark.parametrize("backend", IN_FLOAT32)
def test_packed_rows_equal_the_documents_on_their_own(backend):
    """Also with shared heads: query head h reads key-value head h // group, not h % kv_heads."""
    mixed, gradients = run(backend)
    np.testing.assert_allclose(mixed, expected(), atol=1e-5)
    for found, wanted in zip(gradients, reference()[1], strict=True):
        np.testing.assert_allclose(found, wanted, atol=2e-5)


def test_reference_gradients_equal_finite_differences():
    """The gradients that the other back ends are held to, on one short document. In float64, a
    step of 1e-5 is exact to 1e-9; float32 gradients of size one to 1e-5."""
    inputs, pull = [x[0, :10] for x in (Q, K, V)], PULL[0, :10]
    q, k, v = (jnp.asarray(x[None], jnp.float32) for x in inputs)
    segments = jnp.ones((1, 10), jnp.int32)
    _, back = jax.vjp(lambda *qkv: attention(*qkv, segments, "reference"), q, k, v)
    gradients = back(jnp.asarray(pull[None], jnp.float32))
    for which, place in ((0, (6, 3, 2)), (1, (4, 1, 5)), (2, (3, 0, 0))):
        values = []
        for sign in (1, -1):
            moved = [x.copy() for x in inputs]
            moved[which][place] += sign * 1e-5
            values.append(np.sum(pull * formula(*moved)))
        slope = (values[0] - values[1]) / 2e-5
        assert float(gradients[which][0][place]) == pytest.approx(slope, abs=1e-5)


@pytest.mark.parametrize("backend", IN_BFLOAT16)
def test_bfloat16_stays_near_float32(backend):
    """bfloat16 keeps 8 bits; a softmax in bfloat16 over 128 positions would be off by more."""
    mixed, _ = run(backend, jnp.bfloat16)
    assert mixed.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(mixed, np.float32), expected(), atol=0.04)


@pytest.fixture(scope="module")
def documents_alone():
    """A decoder's parameters, a row of ids, and its output for each document of it alone."""
    shape = dataclasses.replace(TINY, depth=2)
    params = random_params(shape)
    ids = jnp.asarray(RANDOM.integers(0, shape.vocab_size, (1, LENGTH)), jnp.int32)
    ends = np.cumsum(DOCUMENTS[0])
    pieces = [ids[:, end - length : end] for end, length in zip(ends, DOCUMENTS[0], strict=True)]
    apply = jax.jit(Decoder(shape).apply)
    alone = [apply({"params": params}, piece) for piece in pieces]
    return shape, params, ids, jnp.concatenate(alone, axis=1)


@pytest.mark.parametrize("backend", IN_FLOAT32)
def test_decoder_on_a_packed_row_equals_the_documents_on_their_own(backend, documents_alone):
    """Segments and restarted positions, through rotary positions and two layers."""
    shape, params, ids, alone = documents_alone
    positions = jnp.concatenate([jnp.arange(length) for length in DOCUMENTS[0]])[None]
    apply = jax.jit(Decoder(shape, attention=backend).apply)
    packed = apply({"params": params}, ids, jnp.asarray(SEGMENTS[:1]), positions)
    np.testing.assert_allclose(packed, alone, atol=1e-4)


def test_unknown_backend_is_refused():
    with pytest.raises(UserError, match=r"Hardware\.attention is 'flash', expected one of refer"):
        lookup("flash")


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_rotation_by_a_product_is_the_same(dtype):
    """Half of head_dim the other way round, or the minus on the other half, would be far off."""
    x, angles = jnp.asarray(Q, dtype), RANDOM.normal(size=(2, LENGTH, 1, HEAD_DIM // 2))
    tables = [jnp.asarray(np.tile(f(angles), 2), jnp.float32) for f in (np.cos, np.sin)]
    turned, expected = (f(x, *tables) for f in (rotate_by_product, rotate_by_halves))
    assert turned.dtype == expected.dtype == dtype
    np.testing.assert_allclose(  # a fused multiply-add rounds once where two operations round twice
        np.float64(turned), np.float64(expected), rtol=0, atol=jnp.finfo(dtype).eps
    )


@pytest.mark.parametrize("axes", [1, 2])
def test_the_gradient_of_a_weight_on_every_platform(axes):
    """Both forms stand in the program that is not yet lowered: each is run here."""
    x, d_out = jnp.asarray(Q, jnp.float32), RANDOM.normal(size=(*Q.shape[:-axes], 3, 5))
    d_out = jnp.asarray(d_out, jnp.float32)
    program = jax.make_jaxpr(lambda *inputs: weight_gradient(*inputs, axes, jnp.float32))(x, d_out)
    (platforms,) = (e for e in program.eqns if e.primitive.name == "cond")
    forms = [jax.extend.core.jaxpr_as_fun(form) for form in platforms.params["branches"]]
    assert len(forms) == 2
    expected = np.tensordot(np.float64(x), np.float64(d_out), [range(x.ndim - axes)] * 2)
    for form in forms:
        np.testing.assert_allclose(form(x, d_out)[0], expected, atol=1e-4)
