"""What chips may exchange in a train step: its layers as they are in 1B Pro, two of them."""

import json
import os
import pathlib
import subprocess
import sys
from typing import NamedTuple

import pytest
from scheduled import DEPTH

from pangu_tiny import config
from pangu_tiny.model.shape import ModelShape
from pangu_tiny.planning.collectives import Collective

SHAPE = config.build(ModelShape, "models/pangu_pi_1b_pro.gin")


class Exchanges(NamedTuple):
    found: list[Collective]

    def largest(self, kind, dtype):
        """Bytes that a chip receives at one time."""
        sizes = [x.bytes for x in self.found if (x.kind, x.dtype) == (kind, dtype)]
        return max(sizes, default=0)

    @property
    def alone(self):
        """Bytes that a chip receives a layer while nothing is computed."""
        return sum(x.bytes for x in self.found if x.synchronous and x.times == DEPTH)

    @property
    def handed_on(self):
        """Bytes of float32 that a chip receives round the ring in a step."""
        found = [x for x in self.found if x.kind == "collective-permute"]
        assert all(x.dtype == "f32" and not x.synchronous for x in found)
        return sum(x.bytes * x.times for x in found)


def exchanges(*mutant):
    pytest.importorskip("libtpu")
    file = pathlib.Path(__file__).with_name("scheduled.py")
    environment = os.environ | {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "XLA_FLAGS": ""}
    done = subprocess.run(
        [sys.executable, file, *mutant],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return Exchanges([Collective(**found) for found in json.loads(done.stdout)])


@pytest.fixture(scope="module")
def step():
    return exchanges()


def test_layers_are_counted(step):
    """The bound of a layer would say nothing if its loops were not found."""
    assert {x.times for x in step.found} == {1, DEPTH}
    assert step.largest("all-gather", "bf16") > 2 * SHAPE.width * SHAPE.vocab_size * 0.9


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("all-gather", "f32"),  # parameters are gathered in the dtype of the products
        ("all-reduce", "bf16"),  # weight gradients are summed in float32
        ("all-reduce", "f32"),  # and by nothing that moves twice as much as it must
        ("reduce-scatter", "bf16"),
    ],
)
def test_what_is_not_to_be_exchanged(step, kind, dtype):
    """All that may be exchanged so are norms' scales, the loss and the like."""
    assert step.largest(kind, dtype) < 1e6


def test_weight_gradients_go_round_a_ring(step):
    """All of them but the embedding's, which is summed where its rows are looked up."""
    layers = SHAPE.parameters - 2 * SHAPE.vocab_size * SHAPE.width
    summed = SHAPE.vocab_size * SHAPE.width + DEPTH * layers / SHAPE.depth
    assert step.handed_on == pytest.approx(4 * summed * 15 / 16, rel=0.01)


@pytest.mark.parametrize(
    "most",
    [
        20e6,
        pytest.param(
            10e6,
            marks=pytest.mark.xfail(
                strict=True,
                reason="the first product of a layer's backward pass waits for its weights, 16 MB; "
                "taken behind the gradient of these weights, it makes the step longer",
            ),
        ),
    ],
)
def test_layers_wait_for_little(step, most):
    assert step.alone < most


def test_the_way_of_33cf18b_would_be_seen():
    """Weight gradients in bfloat16, by one all-reduce a layer."""
    mutant = exchanges("in_bfloat16")
    assert mutant.largest("all-reduce", "bf16") > 1e6 and mutant.alone > 20e6
    assert mutant.handed_on == 0
