"""The loss in chunks equals the plain formula on all logits, and never has all logits."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from programs import exchanged

from pangu_tiny.model.decoder import Decoder
from pangu_tiny.model.shape import ModelShape
from pangu_tiny.program.batch import BatchLayout
from pangu_tiny.program.loss import cross_entropy
from pangu_tiny.program.optimizer import Optimizer
from pangu_tiny.program.step import Objective, abstract_state, train_step
from pangu_tiny.topology.mesh import make_mesh, named_sharding

B, T, D, VOCAB, PADDED = 8, 12, 16, 100, 128
SCALE = 0.37
"""Of the loss: a gradient that ignores what multiplies the loss would show."""


@functools.cache
def inputs():
    """Hidden states, a tied head's table, targets of which none is padding, weights that leave
    positions and a whole row out."""
    random = np.random.default_rng(0)
    weights = random.integers(0, 2, (B, T)).astype(np.float32)
    weights[3] = 0
    return (
        jnp.asarray(random.normal(size=(B, T, D)), jnp.float32),
        jnp.asarray(random.normal(size=(PADDED, D)), jnp.float32),
        jnp.asarray(random.integers(0, VOCAB, (B, T)), jnp.int32),
        jnp.asarray(weights),
    )


def plain(hidden, table, targets, weights, z_loss):
    logits = hidden @ table[:VOCAB].T
    log_z = jax.nn.logsumexp(logits, axis=-1)
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    nll = weights * (log_z - chosen)
    nats = jax.lax.stop_gradient(nll)  # as nats by position are said to be
    likeliest = jnp.argmax(logits, axis=-1) == targets
    return jnp.sum(nll + z_loss * weights * log_z**2), nats, likeliest


def chunked(hidden, table, targets, weights, z_loss, chunk):
    settings = {"vocab_size": VOCAB, "chunk": chunk, "z_loss": z_loss}
    return cross_entropy(hidden, table.T, targets, weights, **settings)


def differentiated(function, **settings):
    """Value, nats by position, gradients with respect to hidden states and table."""

    def scaled(*arguments):
        total, nats, _ = function(*arguments, **settings)
        return SCALE * total + 7.0 * jnp.sum(nats), nats

    return jax.jit(jax.value_and_grad(scaled, argnums=(0, 1), has_aux=True))


@functools.cache
def expected(z_loss):
    return differentiated(plain, z_loss=z_loss)(*inputs())


def assert_equal(found, z_loss):
    """Float32 sums of some hundred terms in another order."""
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
        found,
        expected(z_loss),
    )
    assert not np.any(found[1][1][VOCAB:]), "padded ids got a gradient"
    assert not np.any(found[0][1][3]), "a row without targets has a loss"


@pytest.mark.parametrize("z_loss", [0.0, 0.1])
@pytest.mark.parametrize("chunk", [1, 20, 48, 1000])
def test_chunks_equal_the_plain_formula(chunk, z_loss):
    """20 tokens do not divide the 96, nor does a chunk of 2 positions × 8 rows fill them."""
    assert_equal(differentiated(chunked, z_loss=z_loss, chunk=chunk)(*inputs()), z_loss)


@pytest.mark.parametrize("sizes", [(1, 8, 1), (1, 4, 2), (2, 2, 2)], ids=str)
def test_meshes_equal_the_plain_formula(sizes):
    """Batch cut over data and fsdp, vocabulary over tensor, the table as training lays it."""
    mesh = make_mesh(*sizes)
    layouts = (("batch", None, None), ("vocab", "embed"), ("batch", None), ("batch", None))
    placed = [
        jax.device_put(x, named_sharding(mesh, axes))
        for x, axes in zip(inputs(), layouts, strict=True)
    ]
    with jax.set_mesh(mesh):
        found = differentiated(chunked, z_loss=0.1, chunk=4)(*placed)
    assert_equal(found, 0.1)


def test_devices_exchange_as_little_of_the_head_as_there_is(tmp_path):
    """They gather it in the dtype of the products. Its gradient stays float32: first each device
    keeps its part of the width, then only that is summed over data."""
    mesh = make_mesh(2, 2, 2)
    hidden, table, targets, weights = inputs()
    abstract = [
        jax.ShapeDtypeStruct(x.shape, dtype, sharding=named_sharding(mesh, axes))
        for x, dtype, axes in (
            (hidden, jnp.bfloat16, ("batch", None, None)),
            (table, jnp.float32, ("vocab", "embed")),
            (targets, jnp.int32, ("batch", None)),
            (weights, jnp.float32, ("batch", None)),
        )
    ]
    with jax.set_mesh(mesh):
        step = differentiated(chunked, z_loss=0.1, chunk=4)
        found = exchanged(step.lower(*abstract), tmp_path)
    head = D * PADDED // mesh.shape["tensor"]
    assert {("all-gather", "bf16", head), ("reduce-scatter", "f32", head // 2)} <= found
    assert max(size for name, dtype, size in found if dtype == "f32") == head // 2


def test_without_gradient_it_is_the_same():
    """Scoring takes another path than training."""
    hidden, table, targets, weights = inputs()
    targets = jnp.argmax(hidden @ table[:VOCAB].T, axis=-1).at[:, ::3].set(targets[:, ::3])
    given = (hidden, table, targets, weights)
    total, nats, likeliest = jax.jit(functools.partial(chunked, z_loss=0.1, chunk=16))(*given)
    expected_total, expected_nats, expected_likeliest = plain(*given, z_loss=0.1)
    np.testing.assert_array_equal(likeliest, expected_likeliest)
    assert 0 < likeliest.sum() < targets.size
    np.testing.assert_allclose(nats, expected_nats, rtol=1e-5, atol=1e-5)
    assert float(total) == pytest.approx(float(expected_total), rel=1e-5)


def test_large_logits_stay_finite():
    """Without the peak taken off, exp of 3,000 is infinite."""
    hidden, table, targets, weights = inputs()
    total, nats, _ = chunked(300 * hidden, table, targets, weights, 0.0, 16)
    assert np.isfinite(total) and np.isfinite(nats).all()


LENGTH = 64
LARGE = ModelShape(
    depth=1, width=32, heads=4, kv_heads=2, ffn_width=48, vocab_size=48_000, series_terms=2
)


def largest_buffer(chunk):
    """Elements of the largest array in the optimized program of a train step, per shard."""
    mesh = make_mesh(1, 4, 2)
    schedule = Optimizer().schedule(1, 1)
    transformation = Optimizer().transformation(schedule)
    decoder = Decoder(LARGE, jnp.bfloat16)
    layout = BatchLayout.of(mesh, 8, 2)
    step = train_step(Objective(decoder, 1, 2, chunk), transformation, schedule, layout)
    batch = layout.abstract(LENGTH)
    with jax.set_mesh(mesh):
        state = abstract_state(decoder, transformation, mesh)
        text = step.lower(state, batch).compile().as_text()
    sizes = re.findall(r"\b(?:pred|[subf]f?\d+)\[([\d,]+)\]", text)
    return max(math.prod(map(int, size.split(","))) for size in sizes)


def test_a_train_step_never_has_all_logits():
    """Per shard 2 rows × 64 positions × 24,000 ids; taken at once, they are there."""
    everything = 2 * LENGTH * 48_000 // 2
    assert largest_buffer(chunk=16) < everything / 2
    assert largest_buffer(chunk=10**6) >= everything
