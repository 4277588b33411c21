"""The decoder: depth, recomputation and the cache change how it is computed, never what."""

import collections
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.interpreters import partial_eval
from programs import equations, matmul_flops
from shapes import TINY, random_params

from pangu_tiny.errors import UserError
from pangu_tiny.model.attention import empty_cache
from pangu_tiny.model.cached import by_layer, extend
from pangu_tiny.model.decoder import (
    REMAT_POLICIES,
    Decoder,
    head_kernel,
    logits,
    parameter_shapes,
    project,
)
from pangu_tiny.model.shape import ModelShape
from pangu_tiny.program.step import Objective

BEGIN, END = 1, 2
IDS = np.random.default_rng(0).integers(3, TINY.vocab_size, (2, 17))
IDS[:, 0], IDS[0, 5:7], IDS[1, -1] = BEGIN, (END, BEGIN), END
ROWS = jnp.asarray(IDS, jnp.int32)
PARAMS = functools.cache(lambda: random_params(TINY))


def loss_and_gradient(**settings):
    """The training loss of a decoder built so: traced, and its value and gradient."""
    objective = Objective(Decoder(TINY, **settings), BEGIN, END, loss_chunk=16)
    function = jax.value_and_grad(lambda params: objective(params, ROWS)[0].total)
    jaxpr = jax.make_jaxpr(function)(parameter_shapes(TINY)).jaxpr
    return jaxpr, jax.jit(function)(PARAMS())


@pytest.fixture(scope="module")
def plain():
    return loss_and_gradient()


def assert_equal_trees(found, expected):
    """Float32 sums in another order: 1e-5 of the largest gradient."""
    found, expected = jax.device_get((found, expected))
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * largest)


def test_every_leaf_gets_a_gradient(plain):
    """A leaf that is read nowhere would be decayed and never trained."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(plain[1][1]):
        assert np.abs(leaf).max() > 0, jax.tree_util.keystr(path)


@pytest.mark.parametrize("unroll", [0, 2])
def test_unrolled_blocks_equal_scanned_blocks(plain, unroll):
    """Also where the factor does not divide the depth."""
    assert_equal_trees(loss_and_gradient(unroll=unroll)[1], plain[1])


@pytest.fixture(scope="module")
def recomputed():
    """What `loss_and_gradient` gives under every remat policy."""
    return {remat: loss_and_gradient(remat=remat) for remat in REMAT_POLICIES}


@pytest.mark.parametrize("remat", REMAT_POLICIES)
def test_remat_equals_no_remat(plain, recomputed, remat):
    assert_equal_trees(recomputed[remat][1], plain[1])


def test_remat_policies_recompute_what_they_say(plain, recomputed):
    """full: the whole of every block but its last product, which no gradient needs. attention:
    the same without the square of attention's weights times values. dots: only the scores, whose
    products have batch axes, since what attention gives is kept too."""
    tokens, shape = 2 * 16, TINY
    part = shape.parameters_by_part()
    half_square = 2 * tokens * 16 * shape.heads * shape.head_dim * shape.depth
    last = 2 * tokens * shape.ffn_width * shape.width * shape.depth
    block = 2 * tokens * (part["attention"] + part["shortcut"] + part["ffn"]) + 2 * half_square
    base = matmul_flops(plain[0])
    extra = {remat: matmul_flops(recomputed[remat][0]) - base for remat in REMAT_POLICIES}
    assert extra["full"] == block - last
    assert extra["attention"] == block - last - half_square
    assert extra["dots"] == half_square


@pytest.mark.parametrize(("remat", "kernels"), [("full", 4), ("dots", 3), ("attention", 3)])
def test_a_fused_kernel_runs_forward_once(remat, kernels):
    """Its normalisers are kept with its output: else the backward pass would run it again, beside
    its own two kernels."""
    shape = ModelShape(depth=2, width=32, heads=1, head_dim=128, ffn_width=48, vocab_size=100)
    decoder = Decoder(shape, jnp.bfloat16, "splash_interpret", remat)
    objective = Objective(decoder, BEGIN, END, loss_chunk=128)
    rows = jax.ShapeDtypeStruct((1, 257), jnp.int32)
    gradient = jax.make_jaxpr(jax.grad(lambda params, rows: objective(params, rows)[0].total))
    jaxpr = gradient(parameter_shapes(shape), rows).jaxpr
    jaxpr, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))  # as the compiler does
    calls = [times for found, times in equations(jaxpr) if found.primitive.name == "pallas_call"]
    assert sum(calls) == kernels * shape.depth


def test_what_is_kept_for_the_backward_pass():
    """In bfloat16 nothing of the width of the feed-forward part is float32, and no matrix, which
    would be one more copy of it."""
    objective = Objective(Decoder(TINY, jnp.bfloat16), BEGIN, END, loss_chunk=16)
    gradient = jax.make_jaxpr(jax.grad(lambda params: objective(params, ROWS)[0].total))
    jaxpr = gradient(parameter_shapes(TINY)).jaxpr
    forward = next(found for found, _ in equations(jaxpr) if found.primitive.name == "scan")
    kept = [x.aval for x in forward.outvars if x.aval.shape[:1] == (TINY.depth,)]
    wide = [aval.dtype for aval in kept if aval.shape[1:] == (2, 16, TINY.ffn_width)]
    assert set(wide) == {jnp.dtype(jnp.bfloat16)}
    assert not any(aval.ndim == 3 for aval in kept), kept


def test_unknown_remat_is_refused():
    with pytest.raises(UserError, match=r"Hardware\.remat is 'some', expected one of none, full"):
        jax.eval_shape(Decoder(TINY, remat="some").apply, {"params": parameter_shapes(TINY)}, ROWS)


@functools.cache
def program_size(depth, unroll):
    shape = dataclasses.replace(TINY, depth=depth)
    objective = Objective(Decoder(shape, unroll=unroll), BEGIN, END, loss_chunk=16)
    gradient = jax.jit(jax.grad(lambda params: objective(params, ROWS)[0].total))
    return gradient.lower(parameter_shapes(shape)).as_text().count(" = ")


def test_scanned_program_does_not_grow_with_depth():
    """The time to compile follows the size of the program; unrolled, it does grow."""
    assert program_size(42, 1) == program_size(21, 1)
    assert program_size(8, 0) > program_size(4, 0)


def test_rotary_angles_are_taken_once_for_all_blocks():
    """XLA computes a sine anew in every use of it, unless it is looked up."""
    objective = Objective(Decoder(TINY, unroll=0), BEGIN, END, loss_chunk=16)
    gradient = jax.jit(jax.grad(lambda params: objective(params, ROWS)[0].total))
    program = gradient.lower(parameter_shapes(TINY)).compile().as_text()
    assert program.count(" sine(") == program.count(" cosine(") <= 1  # 0: known when compiling


def test_cached_decoding_equals_the_whole_sequence():
    """Prompt of 7, then token by token, in a cache with room to spare; every layer's cache
    matters, and a prompt's tokens must not see one another's future."""
    decoder, params = Decoder(TINY), PARAMS()
    whole = jax.jit(lambda params: logits(decoder, params, ROWS))(params)

    @jax.jit
    def advance(params, tokens_bt, cache):
        hidden_btd, cache = extend(decoder, by_layer(params), tokens_bt, cache)
        return project(hidden_btd, params, TINY.vocab_size), cache

    cache = empty_cache(TINY, 20, jnp.zeros(2, jnp.int32), jnp.float32)
    pieces = []
    for start, end in ((0, 7), *((t, t + 1) for t in range(7, ROWS.shape[1]))):
        piece, cache = advance(params, ROWS[:, start:end], cache)
        pieces.append(piece)
        assert int(cache.length) == end
    np.testing.assert_allclose(jnp.concatenate(pieces, axis=1), whole, atol=1e-4)


def test_head_is_its_own_matrix_or_the_table():
    params = PARAMS()
    assert head_kernel(params) is params["head"]["kernel"]
    tied = {name: part for name, part in params.items() if name != "head"}
    np.testing.assert_array_equal(head_kernel(tied), params["embedding"]["table"].T)


def test_padded_ids_never_score():
    hidden = jnp.ones((1, 1, TINY.width))
    assert project(hidden, PARAMS(), TINY.vocab_size).shape == (1, 1, TINY.vocab_size)


def test_bfloat16_stays_near_float32(plain):
    """8 bits through three layers and the loss; the sums over positions are float32."""
    value, gradient = loss_and_gradient(dtype=jnp.bfloat16)[1]
    expected, expected_gradient = plain[1]
    assert float(value) == pytest.approx(float(expected), rel=0.01)
    found, wanted = (
        np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])
        for tree in (gradient, expected_gradient)
    )
    assert np.linalg.norm(found - wanted) < 0.05 * np.linalg.norm(wanted)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(gradient))


@pytest.mark.parametrize("attention", ["reference", "blocked", "dot_product"])
def test_norms_softmax_and_loss_are_float32_under_bfloat16(attention):
    """Exponentials, logarithms, roots and angles lose too much in bfloat16. The inputs of matrix
    products are bfloat16; only the activations (logistic, tanh) may be taken in it besides."""
    objective = Objective(Decoder(TINY, jnp.bfloat16, attention), BEGIN, END, loss_chunk=16)

    def loss(params):
        return objective(params, ROWS)[0].total

    def dtypes(function):
        found = collections.defaultdict(set)
        for equation, _ in equations(jax.make_jaxpr(function)(parameter_shapes(TINY)).jaxpr):
            for operand in equation.invars:
                found[equation.primitive.name].add(str(operand.aval.dtype))
        return found

    delicate = dtypes(jax.grad(loss))
    for name in ("exp", "log", "rsqrt", "cos", "sin", "reduce_max"):
        assert delicate[name] == {"float32"}, name
    assert dtypes(loss)["dot_general"] == {"bfloat16"}
