"""What a chip keeps from the forward pass for the backward pass."""

import dataclasses

import jax.numpy as jnp
import pytest
from tiny_runs import SHAPE

from pangu_tiny.model.decoder import Decoder
from pangu_tiny.planning.memory import saved_bytes
from pangu_tiny.program.step import Objective

ROWS, LENGTH = 3, 64
PLAIN = dataclasses.replace(SHAPE, depth=3, kv_heads=4, series_terms=1, shortcut_ratio=0)


def saved(remat, depth=3, rows=ROWS, tensor=1):
    decoder = Decoder(dataclasses.replace(PLAIN, depth=depth), jnp.bfloat16, "reference", remat)
    return saved_bytes(Objective(decoder, 1, 2, 1024), rows, LENGTH, tensor)


def per_layer(remat, **changes):
    """Without what lies outside of the layers."""
    return saved(remat, 3, **changes) - saved(remat, 2, **changes)


def test_what_is_recomputed_is_not_kept():
    sizes = [saved(remat) for remat in ("none", "dots", "attention", "full")]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 4


def test_a_layer_keeps_what_its_policy_says():
    """Bfloat16: "full" the residual stream, "attention" what attention gives too."""
    stream = 2 * ROWS * LENGTH * PLAIN.width
    assert per_layer("full") == stream
    heads = 2 * ROWS * LENGTH * PLAIN.heads * PLAIN.head_dim
    assert per_layer("attention") == stream + heads
    assert per_layer("full", rows=2 * ROWS) == 2 * stream


@pytest.mark.parametrize(("remat", "cut"), [("full", False), ("attention", True)])
def test_tensor_cuts_heads_and_not_the_stream(remat, cut):
    assert (per_layer(remat, tensor=2) < per_layer(remat)) == cut
    heads = 2 * ROWS * LENGTH * PLAIN.heads * PLAIN.head_dim
    assert per_layer(remat) - per_layer(remat, tensor=2) == (heads // 2 if cut else 0)
