"""Gradients of parameters in bfloat16, against float64.

Such a gradient is a sum over all positions. What is compared is that sum, of the same activations
and cotangents: what was rounded on the way to it stays rounded.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from shapes import TINY, random_params

from pangu_tiny.model import attention, layers
from pangu_tiny.model.decoder import Decoder, Embedding
from pangu_tiny.model.layers import RMSNorm, series_silu
from pangu_tiny.program.loss import cross_entropy

B, T = 512, 16
SHAPE = dataclasses.replace(TINY, depth=1)
RANDOM = np.random.default_rng(0)
SHARES = 1 / np.arange(1, SHAPE.vocab_size + 1)
TOKENS = RANDOM.choice(len(SHARES), (B, T), p=SHARES / SHARES.sum())
"""By Zipf's law: of 8,192 ids a fifth are the same."""

EXACT = 1e-5
"""Of the norm. Float32 sums of 8,192 terms are off by 1e-6 at most, one rounding to bfloat16 by
2e-3, sums in bfloat16 by more."""


def bfloat16(*size):
    return jnp.asarray(RANDOM.normal(0.5, 1, size), jnp.bfloat16)


def float64(x):
    return np.asarray(x, np.float64)


def rounded(x):
    return float64(np.asarray(x, jnp.bfloat16))


def error(found, exact):
    return np.linalg.norm(float64(found) - exact) / np.linalg.norm(exact)


def gradient(function, params, d_out, *inputs):
    """Of the parameters, where `d_out` is that of what the function puts out. Without the option,
    XLA leaves out what is rounded and at once widened again."""

    def pull(params, d_out, *inputs):
        return jax.vjp(lambda params: function(params, *inputs), params)[1](d_out)[0]

    options = {"xla_allow_excess_precision": False}
    return jax.jit(pull, compiler_options=options)(params, d_out, *inputs)


def watched(tensordot, exact):
    """`tensordot`; keeps in `exact` what gradient each kernel gets, in float64, by `key`."""

    def record(x, kernel, d_out):
        positions = (0, 1)  # of batch and position
        exact[key(kernel)] = np.tensordot(float64(x), float64(d_out), (positions, positions))

    def forward(x, kernel, axes):
        out, pull = jax.vjp(lambda x, kernel: tensordot(x, kernel, axes), x, kernel)
        return out, (pull, x, kernel)

    def backward(axes, saved, d_out):
        pull, *inputs = saved
        jax.debug.callback(record, *inputs, d_out)
        return pull(d_out)

    @functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
    def watched(x, kernel, axes):
        return tensordot(x, kernel, axes)

    watched.defvjp(forward, backward)
    return watched


def key(kernel):
    return np.asarray(kernel, jnp.bfloat16).tobytes()


def matrices(params):
    return {
        (part, leaf): np.asarray(matrix[0])
        for part in ("attention", "shortcut", "ffn")
        for leaf, matrix in params["blocks"][part].items()
        if "series" not in leaf
    }


def test_matrices_of_a_block(monkeypatch):
    params, exact = random_params(SHAPE), {}
    for module in (layers, attention):
        monkeypatch.setattr(module, "tensordot", watched(module.tensordot, exact))
    model = Decoder(SHAPE, jnp.bfloat16)

    def run(params):
        return model.apply({"params": params}, TOKENS)

    found = matrices(gradient(run, params, bfloat16(B, T, SHAPE.width)))
    jax.effects_barrier()
    errors = {
        name: error(found[name], exact[key(matrix)]) for name, matrix in matrices(params).items()
    }
    assert len(errors) == 9 and max(errors.values()) < EXACT, errors


def test_embedding():
    """As a whole, and of the commonest id, which is summed most often."""
    module, table_vd = Embedding(SHAPE, jnp.bfloat16), random_params(SHAPE)["embedding"]["table"]
    d_out_btd = bfloat16(B, T, SHAPE.width)

    def run(table_vd):
        return module.apply({"params": {"table": table_vd}}, TOKENS)

    found = gradient(run, table_vd, d_out_btd)
    exact = np.zeros(table_vd.shape)
    np.add.at(exact, TOKENS, float64(d_out_btd))
    assert error(found, exact) < EXACT
    assert error(found[0], exact[0]) < EXACT


def test_series_activation():
    gate_btf, d_out_btf = bfloat16(B, T, SHAPE.ffn_width), bfloat16(B, T, SHAPE.ffn_width)
    scale_nf, bias_nf = RANDOM.normal(size=(2, 2, SHAPE.ffn_width)).astype(np.float32)
    found = gradient(
        lambda params, gate_btf: series_silu(gate_btf, *params),
        (scale_nf, bias_nf),
        d_out_btf,
        gate_btf,
    )
    for term in range(2):
        affine_btf = (gate_btf.astype(jnp.float32) * scale_nf[term] + bias_nf[term]).astype(
            jnp.bfloat16
        )
        d_affine_btf = float64(gradient(jax.nn.silu, affine_btf, d_out_btf))
        d_scale = np.sum(d_affine_btf * float64(gate_btf), axis=(0, 1))
        assert error(found[0][term], d_scale) < EXACT
        assert error(found[1][term], d_affine_btf.sum(axis=(0, 1))) < EXACT


def test_norm():
    x_btd, d_out_btd = bfloat16(B, T, SHAPE.width), bfloat16(B, T, SHAPE.width)
    scale_d = np.ones(SHAPE.width, np.float32)
    norm = RMSNorm(SHAPE.norm_eps)
    found = gradient(
        lambda scale_d, x_btd: norm.apply({"params": {"scale": scale_d}}, x_btd),
        scale_d,
        d_out_btd,
        x_btd,
    )
    x_btd = float64(x_btd)
    normed_btd = x_btd / np.sqrt(np.mean(x_btd**2, axis=-1, keepdims=True) + SHAPE.norm_eps)
    assert error(found, np.sum(normed_btd * float64(d_out_btd), axis=(0, 1))) < EXACT


def test_head():
    """The gradient of the logits is rounded here from float64, there from float32; what comes out
    on another side is too rare to show."""
    hidden_btd, kernel_dv = bfloat16(B, T, SHAPE.width), random_params(SHAPE)["head"]["kernel"]
    weights_bt = np.ones((B, T), np.float32)

    def run(kernel_dv, hidden_btd):
        settings = {"vocab_size": SHAPE.vocab_size, "chunk": 1024}
        return cross_entropy(hidden_btd, kernel_dv, TOKENS, weights_bt, **settings).total

    found = gradient(run, kernel_dv, np.float32(1), hidden_btd)
    hidden_nd = float64(hidden_btd).reshape(-1, SHAPE.width)
    powers_nv = np.exp(hidden_nd @ rounded(kernel_dv)[:, : SHAPE.vocab_size])
    d_logits_nv = powers_nv / powers_nv.sum(axis=-1, keepdims=True)
    d_logits_nv[np.arange(B * T), TOKENS.reshape(-1)] -= 1
    exact = hidden_nd.T @ rounded(d_logits_nv)
    assert error(found[:, : SHAPE.vocab_size], exact) < EXACT
