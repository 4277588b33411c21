"""ModelShape: its counts against the papers' numbers, the real tree and the traced program."""

import dataclasses
import math

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import pytest
from flax.traverse_util import flatten_dict
from programs import matmul_flops
from shapes import MODEL_FILES, TINY, read_shape

from pangu_tiny.errors import UserError
from pangu_tiny.model.decoder import (
    PARAMETER_AXES,
    Decoder,
    parameter_axes,
    parameter_shapes,
    project,
)
from pangu_tiny.model.shape import VOCAB_MULTIPLE, ModelShape

# File → millions of parameters with both modules off, and with n = 2 and r = 32 where it has them.
EXPECTED = {
    "pangu_pi_1b.gin": (1029.8, 1033.2),
    "pangu_pi_1b_pro.gin": (990.98, 995.6),
    "pangu_pi_1_5b_pro.gin": (1500.1, 1506.5),
    "pangu_pi_1b_pro_gqa.gin": (923.5, 928.2),
    "pangu_pi_1_5b_pro_gqa.gin": (1407.8, 1414.2),
    "pangu_pi_7b.gin": (6695.6, 6727.2),
    "pangu_pi_ablation.gin": (951.98, None),
    "llama_2_7b.gin": (6738.4, None),
    "llama_tinyllama_1_1b.gin": (1100.0, None),
}


def count_leaves(shape: ModelShape) -> int:
    """Parameters in the tree, without the padding rows of the vocabulary."""
    leaves = jax.tree.leaves(parameter_shapes(shape))
    tables = 1 if shape.tied else 2
    padding = tables * (shape.padded_vocab - shape.vocab_size) * shape.width
    return sum(math.prod(leaf.shape) for leaf in leaves) - padding


@pytest.mark.parametrize("file", EXPECTED)
def test_shipped_shapes_have_the_papers_counts(file):
    plain, both = EXPECTED[file]
    shape = read_shape(file)
    off = dataclasses.replace(shape, series_terms=1, shortcut_ratio=0)
    decimals = len(str(plain).split(".")[1])
    assert round(off.parameters / 1e6, decimals) == plain
    if both is None:
        assert shape == off
    else:
        assert (shape.series_terms, shape.shortcut_ratio) == (2, 32)
        assert round(shape.parameters / 1e6, 1) == both


def test_every_shipped_shape_has_an_expectation():
    assert {*EXPECTED, "tiny_test.gin"} == set(MODEL_FILES)


def test_ablation_share_of_embedding_and_head():
    shape = read_shape("pangu_pi_ablation.gin")
    part = shape.parameters_by_part()
    assert round(100 * (part["embedding"] + part["head"]) / shape.parameters, 2) == 18.07


@pytest.mark.parametrize("file", MODEL_FILES)
def test_counts_of_shipped_shapes_equal_the_real_tree(file):
    shape = read_shape(file)
    assert count_leaves(shape) == shape.parameters


shapes = st.builds(
    lambda head_dim, kv_heads, group, bottleneck, **rest: ModelShape(
        head_dim=2 * head_dim,
        kv_heads=kv_heads,
        heads=kv_heads * group,
        shortcut_ratio=rest["width"] // bottleneck if bottleneck else 0,
        **rest,
    ),
    depth=st.integers(1, 4),
    width=st.integers(4, 40),
    head_dim=st.integers(1, 5),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    ffn_width=st.integers(1, 50),
    vocab_size=st.integers(1, 300),
    tied=st.booleans(),
    series_terms=st.integers(1, 3),
    bottleneck=st.integers(0, 4),
)


@hypothesis.settings(max_examples=20, deadline=None, derandomize=True)
@hypothesis.given(shape=shapes)
def test_tree_counts_and_axes_agree_for_any_shape(shape):
    leaves = flatten_dict(parameter_shapes(shape), sep="/")
    assert sum(shape.parameters_by_part().values()) == shape.parameters == count_leaves(shape)
    sizes = {
        "layer": shape.depth,
        "embed": shape.width,
        "heads": shape.heads,
        "kv_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "ffn": shape.ffn_width,
        "vocab": shape.padded_vocab,
        "bottleneck": shape.bottleneck,
        "terms": shape.series_terms,
    }
    axes = flatten_dict(parameter_axes(shape), sep="/")
    assert {name: tuple(sizes[axis] for axis in names) for name, names in axes.items()} == {
        name: leaf.shape for name, leaf in leaves.items()
    }
    absent = {name for name in PARAMETER_AXES if name not in leaves}
    assert absent == {
        *(["head/kernel"] if shape.tied else []),
        *(["blocks/shortcut/down", "blocks/shortcut/up"] if not shape.shortcut_ratio else []),
        *(["blocks/ffn/series_scale", "blocks/ffn/series_bias"] if shape.series_terms == 1 else []),
    }
    assert all(leaf.dtype == jnp.float32 for leaf in leaves.values())
    assert shape.padded_vocab % VOCAB_MULTIPLE == 0
    assert 0 <= shape.padded_vocab - shape.vocab_size < VOCAB_MULTIPLE


@pytest.mark.parametrize("tied", [False, True])
def test_flops_formula_equals_the_traced_training_step(tied):
    """The trace makes the whole square of attention; the formula counts its causal half."""
    shape = dataclasses.replace(TINY, tied=tied)
    batch, length = 2, 12

    def loss(params, tokens_bt):
        hidden_btd = Decoder(shape).apply({"params": params}, tokens_bt)
        return jnp.sum(project(hidden_btd, params, shape.vocab_size))

    tokens = jax.ShapeDtypeStruct((batch, length), jnp.int32)
    traced = jax.make_jaxpr(jax.grad(loss))(parameter_shapes(shape), tokens)
    upper_half = 6 * shape.depth * length * shape.heads * shape.head_dim
    per_token = matmul_flops(traced.jaxpr) / (batch * length)
    assert per_token == shape.flops_per_token(length) + upper_half


GOOD = {"depth": 2, "width": 32, "heads": 4, "ffn_width": 8, "vocab_size": 9}


def test_heads_default_to_the_width():
    shape = ModelShape(**GOOD)
    assert (shape.head_dim, shape.kv_heads) == (8, 4)


@pytest.mark.parametrize(
    ("bad", "named"),
    [
        ({"depth": 0}, "ModelShape.depth"),
        ({"width": 0}, "ModelShape.width"),
        ({"heads": 0}, "ModelShape.heads"),
        ({"ffn_width": -1}, "ModelShape.ffn_width"),
        ({"vocab_size": 0}, "ModelShape.vocab_size"),
        ({"series_terms": 0}, "ModelShape.series_terms"),
        ({"heads": 3}, "ModelShape.width 32 is not divisible by ModelShape.heads 3"),
        ({"kv_heads": 3}, "ModelShape.heads 4 is not divisible by ModelShape.kv_heads 3"),
        ({"kv_heads": -2}, "ModelShape.kv_heads"),
        ({"head_dim": 7}, "ModelShape.head_dim"),
        ({"head_dim": -8}, "ModelShape.head_dim"),
        ({"shortcut_ratio": 33}, "ModelShape.shortcut_ratio"),
        ({"shortcut_ratio": -1}, "ModelShape.shortcut_ratio"),
        ({"rope_theta": 0.0}, "ModelShape.rope_theta"),
        ({"rope_theta": math.inf}, "ModelShape.rope_theta"),
        ({"norm_eps": -1e-5}, "ModelShape.norm_eps"),
        ({"norm_eps": math.nan}, "ModelShape.norm_eps"),
    ],
)
def test_bad_sizes_are_refused_by_name(bad, named):
    with pytest.raises(UserError, match=named) as refusal:
        ModelShape(**{**GOOD, **bad})
    assert str(next(iter(bad.values()))) in str(refusal.value)
