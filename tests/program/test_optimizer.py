"""AdamW against its formula, the schedule at its ends, and what decays, leaf by leaf."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from shapes import TINY

from pangu_tiny.errors import UserError
from pangu_tiny.model.decoder import parameter_shapes
from pangu_tiny.program.optimizer import Optimizer, decay_mask

STEPS = 6


def adamw(params, gradients, rates, settings):
    """The formula of the AdamW paper after clipping by the global norm, in float64."""
    names = list(params)
    m, v = ({name: np.zeros(params[name].shape) for name in names} for _ in range(2))
    for count, (gradient, rate) in enumerate(zip(gradients, rates, strict=True), start=1):
        norm = math.sqrt(sum(float(np.sum(gradient[name] ** 2)) for name in names))
        shrink = min(1.0, settings.clip / norm)
        for name in names:
            g = shrink * gradient[name]
            m[name] = settings.b1 * m[name] + (1 - settings.b1) * g
            v[name] = settings.b2 * v[name] + (1 - settings.b2) * g**2
            m_hat = m[name] / (1 - settings.b1**count)
            v_hat = v[name] / (1 - settings.b2**count)
            decay = settings.weight_decay if name == "kernel" else 0.0
            update = m_hat / (np.sqrt(v_hat) + settings.eps) + decay * params[name]
            params[name] = params[name] - rate * update
    return params


def test_updates_follow_the_formula():
    """Norms lie on both sides of the clip; a matrix decays and a stacked scale, which has as many
    axes, does not. Float32 against float64 over six steps."""
    settings = Optimizer(learning_rate=0.1, clip=0.7, weight_decay=0.3, eps=1e-3)
    random = np.random.default_rng(0)
    shapes = {"kernel": (3, 4), "scale": (2, 4)}
    first = {name: random.normal(size=shape) for name, shape in shapes.items()}
    gradients = [
        {name: size * random.normal(size=shape) for name, shape in shapes.items()}
        for size in (0.01, 5.0, 0.1, 0.3, 40.0, 0.02)
    ]
    schedule = settings.schedule(STEPS, 1)
    rates = [float(schedule(step)) for step in range(STEPS)]
    expected = adamw(dict(first), gradients, rates, settings)

    transformation = settings.transformation(schedule)
    params = jax.tree.map(jnp.float32, first)
    state = transformation.init(params)
    for gradient in gradients:
        updates, state = transformation.update(jax.tree.map(jnp.float32, gradient), state, params)
        params = jax.tree.map(jnp.add, params, updates)
    for name, leaf in expected.items():
        np.testing.assert_allclose(params[name], leaf, rtol=1e-5, err_msg=name)


def test_schedule_rises_to_the_peak_and_falls_to_its_fraction():
    """Warm-up of 10 steps of 100: the first is a tenth, the tenth is the peak; halfway down the
    cosine is the mean of peak and end; the last step, not the one after it, has the end."""
    rate = Optimizer(learning_rate=2e-3, warmup_fraction=0.1, final_fraction=0.2).schedule(100, 1)
    assert float(rate(0)) == pytest.approx(2e-4)
    assert float(rate(4)) == pytest.approx(1e-3)
    assert float(rate(9)) == pytest.approx(2e-3)
    assert float(rate(8)) < float(rate(9)) > float(rate(10))
    assert float(rate(54)) == pytest.approx((2e-3 + 4e-4) / 2)
    assert float(rate(99)) == pytest.approx(4e-4)
    assert float(rate(98)) > float(rate(99))


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_schedule_of_hardly_any_steps(steps):
    """Never zero, never not a number, and the last one is the end of the fall, or the peak."""
    rate = Optimizer(learning_rate=1.0, warmup_fraction=0.0, final_fraction=0.1).schedule(steps, 1)
    values = [float(rate(step)) for step in range(steps)]
    assert values[0] == pytest.approx(1.0)
    assert values[-1] == pytest.approx(1.0 if steps == 1 else 0.1)


def test_rate_follows_the_papers_rule_unless_given():
    """4M tokens, four times batch₀, at r = 0.5: twice lr₀."""
    assert Optimizer().peak_rate(2**22) == pytest.approx(2e-4)
    assert Optimizer().peak_rate(2**20) == pytest.approx(1e-4)
    assert Optimizer(rate_exponent=1.0).peak_rate(2**22) == pytest.approx(4e-4)
    assert Optimizer(learning_rate=3e-4).peak_rate(2**22) == 3e-4
    assert float(Optimizer().schedule(100, 2**22)(2)) == pytest.approx(2e-4)


DECAYS = {
    "embedding/table": True,
    "blocks/attention_norm/scale": False,
    "blocks/attention/query": True,
    "blocks/attention/key": True,
    "blocks/attention/value": True,
    "blocks/attention/out": True,
    "blocks/shortcut/down": True,
    "blocks/shortcut/up": True,
    "blocks/ffn_norm/scale": False,
    "blocks/ffn/gate": True,
    "blocks/ffn/up": True,
    "blocks/ffn/down": True,
    "blocks/ffn/series_scale": False,
    "blocks/ffn/series_bias": False,
    "final_norm/scale": False,
    "head/kernel": True,
}


def test_matrices_decay_and_nothing_else_does():
    """On the scanned tree, where norms have two axes as the matrices of other models have."""
    assert flatten_dict(decay_mask(parameter_shapes(TINY)), sep="/") == DECAYS


def test_a_leaf_without_a_rule_is_an_error():
    with pytest.raises(ValueError, match=r"no rule says whether .*router.* decays"):
        decay_mask({"blocks": {"router": jnp.zeros(3)}})


@pytest.mark.parametrize(
    "settings", [{"warmup_fraction": 1.5}, {"final_fraction": -0.1}, {"clip": 0.0}], ids=str
)
def test_impossible_settings_are_refused(settings):
    ((name, value),) = settings.items()
    with pytest.raises(UserError, match=rf"Optimizer\.{name} is {value}, expected"):
        Optimizer(**settings)
