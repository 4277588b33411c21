"""The layers of a block against their formulas in float64."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from shapes import TINY, draw_params

from pangu_tiny.model.decoder import Decoder, parameter_shapes
from pangu_tiny.model.layers import (
    AugmentedShortcut,
    FeedForward,
    RMSNorm,
    apply_rope,
    rope_tables,
    series_silu,
)
from pangu_tiny.program.optimizer import Optimizer

RANDOM = np.random.default_rng(0)


def silu(x):
    return x / (1 + np.exp(-x))


def gelu_tanh(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def test_rms_norm_formula():
    x, scale = RANDOM.normal(size=(2, 3, 8)), RANDOM.normal(size=8)
    eps = 0.1  # large enough that leaving it out, or adding it outside of the root, is seen
    params = {"params": {"scale": jnp.asarray(scale, jnp.float32)}}
    found = RMSNorm(eps).apply(params, jnp.asarray(x, jnp.float32))
    expected = x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + eps) * scale
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_rope_turns_half_split_pairs():
    """Neighbouring pairs (2i, 2i + 1), as in the first LLaMA code, would fail."""
    head_dim, theta = 6, 500.0
    x = RANDOM.normal(size=(1, 4, 2, head_dim))
    positions = np.array([[0, 1, 7, 300]])
    tables = rope_tables(positions, head_dim, theta)
    found = apply_rope(jnp.asarray(x, jnp.float32), tables)
    expected = np.empty_like(x)
    for pair in range(head_dim // 2):
        angle = positions[..., None] * theta ** (-2 * pair / head_dim)
        first, second = x[..., pair], x[..., pair + head_dim // 2]
        expected[..., pair] = first * np.cos(angle) - second * np.sin(angle)
        expected[..., pair + head_dim // 2] = second * np.cos(angle) + first * np.sin(angle)
    # float32 angles up to 300 rad are known to 300 · 2⁻²⁴.
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_the_gradient_of_rope_is_turned_back():
    x, pull = RANDOM.normal(size=(2, 1, 4, 2, 6))
    tables = tuple(
        table[np.array([[0, 1, 7, 300]])] for table in rope_tables(np.arange(301), 6, 500.0)
    )
    back = jax.vjp(lambda x: apply_rope(x, tables), jnp.asarray(x))[1](jnp.asarray(pull))[0]
    # A rotation is orthogonal: what is turned back and forth is what it was.
    np.testing.assert_allclose(apply_rope(back, tables), pull, atol=1e-5)


def test_rope_makes_scores_depend_on_distance_alone():
    q, k = RANDOM.normal(size=(2, 1, 1, 1, 8)).astype(np.float32)

    def score(query_position, key_position):
        def turned(x, position):
            tables = tuple(
                table[np.array([[position]])] for table in rope_tables(np.arange(200), 8, 1e4)
            )
            return apply_rope(jnp.asarray(x), tables)

        return float(jnp.sum(turned(q, query_position) * turned(k, key_position)))

    assert score(5, 2) == pytest.approx(score(105, 102), abs=1e-4)
    assert score(5, 2) != pytest.approx(score(5, 3), abs=1e-2)


@pytest.mark.parametrize("terms", [1, 2, 3])
def test_feed_forward_formula(terms):
    x = RANDOM.normal(size=(2, 3, 8))
    weights = {"gate": (8, 10), "up": (8, 10), "down": (10, 8)}
    if terms > 1:
        weights |= {"series_scale": (terms, 10), "series_bias": (terms, 10)}
    weights = {name: RANDOM.normal(size=size) for name, size in weights.items()}
    gate = x @ weights["gate"]
    active = silu(gate)
    if terms > 1:
        pairs = zip(weights["series_scale"], weights["series_bias"], strict=True)
        active = sum(silu(scale * gate + bias) for scale, bias in pairs)
    expected = (active * (x @ weights["up"])) @ weights["down"]
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), {"params": weights})
    found = FeedForward(10, terms).apply(params, jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-3)


def test_augmented_shortcut_formula():
    x, down, up = (RANDOM.normal(size=size) for size in ((2, 3, 8), (8, 2), (2, 8)))
    expected = gelu_tanh(x @ down) @ up
    params = jax.tree.map(
        lambda leaf: jnp.asarray(leaf, jnp.float32), {"params": {"down": down, "up": up}}
    )
    found = AugmentedShortcut(2).apply(params, jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


PLAIN = dataclasses.replace(TINY, series_terms=1, shortcut_ratio=0)
TOKENS = jnp.asarray(RANDOM.integers(0, TINY.vocab_size, (2, 16)), jnp.int32)


def without(params, *names):
    """A copy of a parameter tree that lacks leaves or parts of that name."""
    if not isinstance(params, dict):
        return params
    return {name: without(part, *names) for name, part in params.items() if name not in names}


def test_shortcut_leaves_the_plain_model_at_initialisation():
    params = without(draw_params(), "series_scale", "series_bias")
    assert np.any(params["blocks"]["shortcut"]["down"])  # else no gradient would ever reach it
    augmented = Decoder(dataclasses.replace(PLAIN, shortcut_ratio=TINY.shortcut_ratio))
    np.testing.assert_array_equal(
        jax.jit(augmented.apply)({"params": params}, TOKENS)[0],
        jax.jit(Decoder(PLAIN).apply)({"params": without(params, "shortcut")}, TOKENS)[0],
    )


def test_series_activation_is_near_the_plain_model_at_initialisation():
    """SiLU(a·g) ≈ a·g/2 near zero, so that a second term of spread 0.01 moves a feed-forward part
    by about one percent; and by something, or the term could not train."""
    x_btd = jnp.asarray(RANDOM.normal(size=(2, 16, TINY.width)), jnp.float32)
    ffn = jax.tree.map(lambda leaf: leaf[0], draw_params()["blocks"]["ffn"])
    series = FeedForward(TINY.ffn_width, 2).apply({"params": ffn}, x_btd)
    plain = {name: ffn[name] for name in ("gate", "up", "down")}
    plain = FeedForward(TINY.ffn_width, 1).apply({"params": plain}, x_btd)
    change = jnp.linalg.norm(series - plain) / jnp.linalg.norm(plain)
    assert 1e-3 < change < 0.03


def test_series_activation_at_initialisation_has_one_whole_term_and_no_bias():
    ffn = draw_params()["blocks"]["ffn"]
    scale_lnf = np.asarray(ffn["series_scale"])
    assert (scale_lnf[:, 0] == 1).all() and not np.any(ffn["series_bias"])
    assert len(np.unique(scale_lnf[:, 1])) == scale_lnf[:, 1].size


@pytest.mark.parametrize(
    ("changes", "present"),
    [
        ({}, {"shortcut", "series_scale", "series_bias"}),
        ({"series_terms": 1}, {"shortcut"}),
        ({"shortcut_ratio": 0}, {"series_scale", "series_bias"}),
        ({"series_terms": 1, "shortcut_ratio": 0}, set()),
    ],
)
def test_each_module_is_present_or_absent_on_its_own(changes, present):
    blocks = parameter_shapes(dataclasses.replace(TINY, **changes))["blocks"]
    assert {"shortcut", "series_scale", "series_bias"} & (blocks.keys() | blocks["ffn"]) == present


@pytest.fixture(scope="module")
def ten_steps():
    """Ten real optimizer steps on the scales of a three-term activation, from given ones."""
    x_bd = jnp.asarray(RANDOM.normal(size=(64, 8)), jnp.float32)
    wanted_bd = jnp.asarray(RANDOM.normal(size=(64, 8)), jnp.float32)
    layer = FeedForward(16, 3)
    optimizer = Optimizer(learning_rate=1e-2)
    transformation = optimizer.transformation(optimizer.schedule(10, 1))

    @jax.jit
    def step(params, state):
        def loss(params):
            return jnp.mean(jnp.square(layer.apply({"params": params}, x_bd) - wanted_bd))

        updates, state = transformation.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    def run(scale_of):
        params = layer.init(jax.random.key(0), x_bd)["params"]
        params["series_scale"] = scale_of(params["series_scale"])
        state = transformation.init(params)
        for _ in range(10):
            params, state = step(params, state)
        return np.asarray(params["series_scale"])

    return run


def test_terms_of_the_series_separate(ten_steps):
    """Drawn scales stay apart; equal ones, which get equal gradients, would stay equal."""
    drawn_nf = ten_steps(lambda scale_nf: scale_nf)
    assert (np.abs(drawn_nf[1] - drawn_nf[2]) > 1e-3).mean() > 0.9
    equal_nf = ten_steps(lambda scale_nf: scale_nf.at[1:].set(0.01))
    np.testing.assert_array_equal(equal_nf[1], equal_nf[2])
    assert np.abs(equal_nf[1] - 0.01).min() > 1e-3  # though they did move


def test_series_of_one_term_is_silu():
    gate = jnp.asarray(RANDOM.normal(size=(4, 8)), jnp.float32)
    one, zero = jnp.ones((1, 8)), jnp.zeros((1, 8))
    np.testing.assert_array_equal(series_silu(gate, one, zero), jax.nn.silu(gate))
