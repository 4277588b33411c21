"""The three random initialisations: their spread layer by layer, and what a seed decides."""

import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from shapes import TINY, draw_params

from pangu_tiny.errors import UserError
from pangu_tiny.model.decoder import Decoder
from pangu_tiny.model.init import SCHEMES, SERIES_STD, STD, apply_scheme
from pangu_tiny.program.optimizer import Optimizer
from pangu_tiny.program.step import init_state
from pangu_tiny.topology.mesh import make_mesh

RESIDUAL_OUTPUTS = ("blocks/attention/out", "blocks/ffn/down")
CONSTANTS = {"scale": 1.0, "series_bias": 0.0}
FACTORS = {
    "constant": lambda layer: 1.0,
    "gpt2": lambda layer: (2 * TINY.depth) ** -0.5,
    "internevo": lambda layer: (2 * (layer + 1)) ** -0.5,
}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_standard_deviations_per_layer(scheme):
    """Of n draws the deviation is known to 1/√(2n): 5 of these are allowed for. The smallest
    matrix has 128 entries, one layer to the next differs by √2 or more."""
    for name, leaf in flatten_dict(draw_params(scheme), sep="/").items():
        leaf = np.asarray(leaf)
        last = name.split("/")[-1]
        if last in CONSTANTS or name == "blocks/shortcut/up":
            assert (leaf == CONSTANTS.get(last, 0.0)).all(), name
            continue
        if last == "series_scale":
            draws, expected = leaf[:, 1:].reshape(-1), SERIES_STD
            assert draws.std() == pytest.approx(expected, rel=5 / np.sqrt(2 * draws.size)), name
            continue
        stacked = leaf if name.startswith("blocks/") else leaf[None]
        for layer, matrix in enumerate(stacked):
            expected = STD * (FACTORS[scheme](layer) if name in RESIDUAL_OUTPUTS else 1.0)
            slack = 5 / np.sqrt(2 * matrix.size)
            assert matrix.std() == pytest.approx(expected, rel=slack), f"{name}, layer {layer}"
            assert abs(matrix.mean()) < 5 * expected / np.sqrt(matrix.size), name


def test_schemes_differ_in_the_residual_outputs_alone():
    """And there by an exact factor: the same draws, scaled."""
    constant = flatten_dict(draw_params("constant"), sep="/")
    for scheme in ("gpt2", "internevo"):
        factors = np.array([FACTORS[scheme](layer) for layer in range(TINY.depth)])
        for name, leaf in flatten_dict(draw_params(scheme), sep="/").items():
            expected = np.asarray(constant[name])
            if name in RESIDUAL_OUTPUTS:
                expected = expected * factors.reshape(-1, *[1] * (leaf.ndim - 1))
            np.testing.assert_allclose(leaf, expected, rtol=1e-6, err_msg=name)


def test_layers_and_leaves_are_drawn_apart():
    """One key for all layers, or for leaves of one size, would repeat the numbers."""
    firsts = [
        float(layer.reshape(-1)[0])
        for name, leaf in flatten_dict(draw_params(), sep="/").items()
        if name.split("/")[-1] not in CONSTANTS and name != "blocks/shortcut/up"
        for layer in (leaf if name.startswith("blocks/") else leaf[None])
        if "series_scale" not in name
    ]
    assert len(set(firsts)) == len(firsts) == 2 + 8 * TINY.depth


def test_a_seed_decides_all_numbers():
    table = draw_params(seed=0)["embedding"]["table"]
    assert not np.array_equal(table, draw_params(seed=1)["embedding"]["table"])


def test_one_and_eight_devices_draw_the_same_numbers():
    """Bit for bit, in machine code that is optimised as it is for users; hence in a process of its
    own."""
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    folder = pathlib.Path(__file__).parent
    code = f"import sys; sys.path[:0] = {[str(folder), str(folder.parent)]}\n"
    code += "import test_init; test_init.draw_on_one_and_eight_devices()"
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


def draw_on_one_and_eight_devices():
    """In the layout of the mesh from the start."""
    optimizer = Optimizer()
    transformation = optimizer.transformation(optimizer.schedule(10, 1))
    mesh = make_mesh(1, 4, 2)
    state = init_state(Decoder(TINY), transformation, "internevo", 0, mesh)
    for found, expected in zip(
        jax.tree.leaves(state.params), jax.tree.leaves(draw_params("internevo")), strict=True
    ):
        np.testing.assert_array_equal(found, expected)
    query = state.params["blocks"]["attention"]["query"]
    assert query.sharding.shard_shape(query.shape) == (TINY.depth, TINY.width // 4, 2, 6)


def test_unknown_scheme_is_refused():
    with pytest.raises(UserError, match="init is 'xavier', expected one of constant, gpt2, intern"):
        apply_scheme({}, "xavier")
