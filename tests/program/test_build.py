"""What is compiled follows from sizes alone: no array is there, and no folder."""

import jax
import numpy as np
import pytest
from tiny_runs import SHAPE

from pangu_tiny.data.rows import Marks
from pangu_tiny.errors import UserError
from pangu_tiny.program.build import build, build_training
from pangu_tiny.program.feed import Feed
from pangu_tiny.program.optimizer import Optimizer, SharedSchedule
from pangu_tiny.program.step import init_state
from pangu_tiny.topology.hardware import Hardware

LENGTH = 16


@pytest.fixture(scope="module")
def program():
    hardware = Hardware(fsdp=2, tensor=2, per_device_batch=2, loss_chunk=8)
    return build(SHAPE, hardware, Marks(1, 2), "float32", devices=jax.devices()[:4])


def test_steps_are_compiled_from_what_is_abstract(program):
    """And take what really is there: it has the same shapes, types and layouts."""
    training = build_training(program, Optimizer(), 10, 8, LENGTH)
    assert (training.layout.accumulation, training.layout.rows_at_once) == (2, 4)
    rows = np.random.default_rng(0).integers(3, 300, (8, LENGTH + 1))
    batch = Feed(training.layout).place({"rows": rows, "row_ids": np.arange(8)})
    decoder = program.objective.decoder
    state = init_state(decoder, training.optimizer, "constant", 0, program.mesh)

    def abstract(tree):
        return jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding.spec), tree)

    assert abstract(state) == abstract(training.state)
    assert abstract(batch) == abstract(training.layout.abstract(LENGTH))
    assert abstract(state.params) == abstract(program.params)
    with jax.set_mesh(program.mesh):
        score = program.score.lower(program.params, training.layout.abstract_rows(LENGTH))
        step = training.step.lower(training.state, training.layout.abstract(LENGTH))
        nats, targets = score.compile()(state.params, batch.rows_abt[0])
        _, metrics = step.compile()(state, batch)
    np.testing.assert_allclose(metrics.row_nats[:4], nats, rtol=1e-5)
    assert (np.asarray(targets) == LENGTH).all()


def test_a_schedule_that_other_runs_share():
    assert SharedSchedule().within(30) == (0, 30)
    assert SharedSchedule(start=10).within(30) == (10, 40)
    assert SharedSchedule(10, 50).within(30) == (10, 50)
    with pytest.raises(UserError, match=r"start 30 and train\.steps 30 go beyond .*steps 50"):
        SharedSchedule(30, 50).within(30)
    with pytest.raises(UserError, match=r"SharedSchedule\.start is -1, expected at least 0"):
        SharedSchedule(start=-1)


def test_another_shape_on_the_same_mesh(program):
    deeper = program.resized(SHAPE.__class__(**{**vars(SHAPE), "depth": 5}))
    assert deeper.shape.depth == 5 and deeper.mesh is program.mesh
    assert deeper.params["blocks"]["ffn"]["up"].shape[0] == 5
