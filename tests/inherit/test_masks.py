"""Learned masks: exact counts, a gradient that knows the count, and a choice that is right."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shapes import random_params
from teachers import masked, random_scores, save

from pangu_tiny.data.loader import batches
from pangu_tiny.data.order import Order
from pangu_tiny.errors import UserError
from pangu_tiny.inherit.cut_list import plan
from pangu_tiny.inherit.layers import LayerChoice
from pangu_tiny.inherit.masks import (
    MaskTraining,
    as_heads,
    draw_masks,
    first_logits,
    hard_top,
    head_groups,
    soft_top,
    targets,
)
from pangu_tiny.inherit.rank_teacher import rank_teacher
from pangu_tiny.inherit.structures import masked_shape
from pangu_tiny.model.decoder import Decoder
from pangu_tiny.model.shape import ModelShape
from pangu_tiny.program.step import Objective
from pangu_tiny.topology.hardware import Hardware

hard, soft = jax.jit(hard_top), jax.jit(soft_top)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.floats(-30, 30, width=32, allow_subnormal=False), min_size=9, max_size=9),
    st.integers(1, 9),
    st.floats(0.05, 2),
)
def test_masks_add_up(scores, count, temperature):
    """Whatever the logits, equal ones included; 1e-3 of a structure."""
    scores = jnp.asarray([scores, scores[::-1]])
    assert (hard(scores, count).sum(-1) == count).all()
    mask = soft(scores, count, temperature)
    np.testing.assert_allclose(mask.sum(-1), count, atol=1e-3)
    assert ((mask >= 0) & (mask <= 1)).all()
    best = np.sort(np.asarray(scores), -1)[:, -count]
    assert (np.asarray(scores)[np.asarray(hard(scores, count)) > 0] >= best.min()).all()


def test_the_gradient_keeps_the_count():
    """To favour one structure is to disfavour the others: the soft masks' gradients add up to
    nothing, and agree with finite differences."""
    scores = jnp.asarray([0.3, -1.0, 2.0, 0.5, -0.2])
    jacobian = jax.jacobian(lambda s: soft_top(s, 2, 0.7))(scores)
    np.testing.assert_allclose(jacobian.sum(0), 0, atol=1e-5)
    step = 1e-2
    for place in range(5):
        moved = jnp.zeros(5).at[place].set(step)
        rise = (soft(scores + moved, 2, 0.7) - soft(scores - moved, 2, 0.7)) / (2 * step)
        np.testing.assert_allclose(jacobian[:, place], rise, atol=1e-3)


def test_the_kept_number_comes_down(ranked_shape):
    """From all to the target, over the first part of the steps, and stays."""
    small = dataclasses.replace(ranked_shape, width=24, heads=2, kv_heads=1, ffn_width=16)
    wanted = targets(ranked_shape, small)
    assert wanted == {"embed": (24, 32), "kv_heads": (1, 2), "ffn": (16, 48), "bottleneck": (3, 4)}
    training = MaskTraining(steps=10)
    logits = jax.tree.map(jnp.asarray, first_logits(ranked_shape, 2, None))
    kept = [
        draw_masks(logits, wanted, training, jnp.asarray(step), jax.random.key(0))
        for step in range(10)
    ]
    neurons = [masks["ffn"].sum(-1).round().tolist() for masks in kept]
    assert neurons[0] == [42, 42] and neurons[4:] == [[16, 16]] * 6
    for masks in kept[5:]:
        assert round(float(masks["embed"].sum())) == 24
        pairs = masks["heads"].reshape(2, 2, 2).round()
        assert (pairs.sum((1, 2)) == 2).all() and set(pairs.sum(-1).ravel().tolist()) == {0, 2}


def test_heads_are_chosen_as_they_are_cut():
    """8 key-value heads of 4: dropped groups, merged ones, or a copy for every head."""
    teacher = ModelShape(depth=1, width=64, heads=32, kv_heads=8, ffn_width=6, vocab_size=20)
    small = dataclasses.replace(teacher, heads=14, kv_heads=7)
    assert targets(teacher, small) == {"kv_heads": (7, 8), "heads": (2, 4)}
    small = dataclasses.replace(teacher, heads=14, kv_heads=14)
    assert targets(teacher, small, "repeat") == {"heads": (14, 32)}
    small = dataclasses.replace(teacher, heads=16, kv_heads=4)
    assert targets(teacher, small, "merge") == {"heads": (4, 8)}
    scores = {"heads": np.arange(32.0)[None], "kv_heads": np.zeros((1, 8))}
    scores |= {"embed": np.zeros(64), "ffn": np.zeros((1, 6))}
    for kv in ("repeat", "merge"):
        groups = head_groups(teacher, small, kv)
        logits = first_logits(teacher, groups, scores)
        assert logits["heads"].shape == (1, groups, 32 // groups)


def test_a_shortcut_that_goes_is_gone_in_training(ranked_shape):
    small = dataclasses.replace(ranked_shape, shortcut_ratio=0)
    wanted = targets(ranked_shape, small)
    assert wanted == {"bottleneck": (0, 4)}
    logits = jax.tree.map(jnp.asarray, first_logits(ranked_shape, 2, None))
    masks = draw_masks(logits, wanted, MaskTraining(), jnp.asarray(0), jax.random.key(0))
    assert not masks["bottleneck"].any()


def test_heads_go_with_their_key_value_head():
    masks = as_heads({"kv_heads": jnp.asarray([[1.0, 0]])}, (1, 2, 3))
    np.testing.assert_array_equal(masks["heads"], [[1, 1, 1, 0, 0, 0]])
    within = jnp.asarray([[[1.0, 0, 1], [0, 1, 1]]])
    masks = as_heads({"kv_heads": jnp.asarray([[1.0, 0]]), "heads": within}, (1, 2, 3))
    np.testing.assert_array_equal(masks["heads"], [[1, 0, 1, 0, 0, 0]])


def test_it_goes_where_the_loss_falls(rows, ranked_shape, tokenizer_of_rows, tmp_path):
    """The choice has a lower loss than any of 30 random ones, and than the opposite choice."""
    params = random_params(ranked_shape)
    for part, name in (("ffn", "down"), ("attention", "out")):
        params["blocks"][part][name] *= 3  # so that it matters what is left
    workdir = tmp_path / "teacher"
    teacher = save(workdir, ranked_shape, params, tokenizer=tokenizer_of_rows, sequence_length=32)
    small = dataclasses.replace(ranked_shape, heads=2, kv_heads=1, ffn_width=24)
    found = rank_teacher(
        teacher,
        str(tmp_path / "rank"),
        Hardware(data=1, fsdp=4, tensor=2),
        LayerChoice(),
        MaskTraining(steps=100, learning_rate=0.2, start="zero"),
        rows.path,
        method="learned",
        model=small,
        calibration_batches=1,
        batch_size=16,
    )
    batch = next(batches(rows, "train", 64, Order(5)))["rows"]

    @jax.jit
    def loss(params):
        shape = masked_shape(ranked_shape, small.width)
        objective = Objective(Decoder(shape), rows.begin_id, rows.end_id, 1024)
        return objective(params, batch)[0].total

    def loss_of(scores):
        cuts = plan(ranked_shape, "", small, [0, 1], scores)
        return float(loss(masked(params, ranked_shape, cuts)[0]))

    learned = found.structures([0, 1])
    opposite = {kind: -scores for kind, scores in learned.items()}
    others = [loss_of(random_scores(ranked_shape, 2, seed)) for seed in range(30)]
    assert loss_of(learned) < min(others) < loss_of(opposite)


def test_a_start_from_scores():
    shape = ModelShape(depth=2, width=8, heads=4, kv_heads=2, ffn_width=6, vocab_size=20)
    random = np.random.default_rng(0)
    scores = {
        "embed": random.random(8),
        "kv_heads": random.random((2, 2)),
        "heads": random.random((2, 4)),
        "ffn": random.random((2, 6)),
    }
    logits = first_logits(shape, 2, scores)
    assert logits.keys() == scores.keys() and logits["heads"].shape == (2, 2, 2)
    for kind in ("embed", "ffn"):
        assert (np.argsort(logits[kind]) == np.argsort(scores[kind])).all()
        assert logits[kind].min() == -1 and logits[kind].max() == 1


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"steps": 0}, "MaskTraining.steps is 0, expected at least 1"),
        ({"last_temperature": 0.0}, "last_temperature 0.0: expected positive"),
        ({"first_temperature": 0.01}, "expected positive numbers, the last not above"),
        ({"shrink_fraction": 1.5}, "shrink_fraction is 1.5, expected at least 0 and at most 1"),
        ({"learning_rate": -1.0}, "learning_rate is -1.0, expected at least 0"),
        ({"noise": math.inf}, "noise is inf, expected at least 0 and finite"),
        ({"start": "l2"}, "start is 'l2', expected one of zero, taylor"),
    ],
)
def test_bad_settings(changes, said):
    with pytest.raises(UserError, match=said):
        MaskTraining(**changes)
