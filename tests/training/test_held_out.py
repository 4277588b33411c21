"""The held-out loss: every target once, or rows that stand for all of them."""

import math
from types import SimpleNamespace
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from shapes import random_params
from tiny_runs import SHAPE

from pangu_tiny.data.dataset import TokenDataset
from pangu_tiny.data.rows import read_marks
from pangu_tiny.program.build import build
from pangu_tiny.topology.hardware import Hardware
from pangu_tiny.topology.mesh import make_mesh
from pangu_tiny.training import held_out
from pangu_tiny.training.held_out import score_held_out


@pytest.fixture(scope="module")
def two_sources(prepare, corpora, tmp_path_factory):
    return prepare(corpora, tmp_path_factory.mktemp("two") / "data", held_out_fraction=0.4)


def scored_by_ids(dataset, rows=None, per_device_batch=1):
    """On eight devices, with the sum of its ids for the loss of a row, which is exact."""

    def score(_, rows_bt):
        weights = read_marks(rows_bt, dataset.begin_id, dataset.end_id).weights
        return jnp.sum(rows_bt, axis=-1).astype(jnp.float32), jnp.sum(weights, axis=-1)

    mesh = make_mesh(1, 4, 2)
    hardware = Hardware(per_device_batch=per_device_batch)
    program = SimpleNamespace(mesh=mesh, hardware=hardware, score=jax.jit(score))
    return score_held_out(program, {}, dataset, rows)


def test_held_out_targets_are_scored_once_each(dataset):
    """The last partial batch included: the same on one device as on eight, in batches of 4 and of
    16, neither of which divides the rows."""
    rows = TokenDataset.open(dataset)
    assert rows.count("held_out") % 4
    params = random_params(SHAPE)
    found = []
    for fsdp, tensor in ((1, 1), (4, 2)):
        hardware = Hardware(1, fsdp, tensor, per_device_batch=1, loss_chunk=64)
        devices = jax.devices()[: fsdp * tensor]
        program = build(SHAPE, hardware, rows.marks, "float32", devices=devices)
        with jax.set_mesh(program.mesh):
            found.append(score_held_out(program, params, rows))
    one, eight = found
    np.testing.assert_array_equal(one.targets, eight.targets)
    assert one.targets.sum() == rows.description["splits"]["held_out"]["targets"]
    np.testing.assert_allclose(one.nats, eight.nats, rtol=1e-5)


@pytest.mark.parametrize("rows", [None, 1000, 7])
def test_bits_per_byte_of_all_and_of_some_rows(two_sources, rows):
    """Exact where all are scored; else nats per token of some, tokens per byte of all."""
    found = scored_by_ids(two_sources, rows)
    split = two_sources.description["splits"]["held_out"]
    all_rows = two_sources.count("held_out")
    assert len(found.row_ids) == min(rows or all_rows, all_rows) and all_rows > 20
    read = two_sources.read("held_out", found.row_ids)
    np.testing.assert_array_equal(found.nats, read.sum(axis=1))
    sources = two_sources.source_ids("held_out", found.row_ids)
    for source in (None, "a", "b"):
        mine = slice(None) if source is None else sources == two_sources.sources.index(source)
        counts = split if source is None else split["sources"][source]
        nats, targets = found.nats[mine].sum(), found.targets[mine].sum()
        figures = found.figures(two_sources, source)
        assert figures["targets"] == targets <= counts["targets"]
        assert (targets == counts["targets"]) == (rows != 7)
        assert figures["nats_per_token"] == nats / targets
        expected = nats / targets * counts["targets"] / math.log(2) / counts["bytes"]
        assert figures["bits_per_byte"] == pytest.approx(expected, rel=1e-12)
        if rows != 7:
            assert figures["bits_per_byte"] == nats / math.log(2) / counts["bytes"]


def test_a_source_of_which_no_row_was_scored_has_no_figures(two_sources):
    assert scored_by_ids(two_sources, 1).figures(two_sources, "b") == {}


@given(st.integers(0, 10**6), st.integers(1, 300), st.data())
def test_rows_that_stand_for_all_are_spread_evenly(total, count, data):
    """Each once, and of any neighbours their share, less or more than one row."""
    rows = held_out._spread(total, count)
    assert len(rows) == min(total, count) and (np.diff(rows) > 0).all()
    first = data.draw(st.integers(0, total))
    end = data.draw(st.integers(first, total))
    taken = np.sum((rows >= first) & (rows < end))
    assert abs(taken * total - len(rows) * (end - first)) <= total


def test_losses_are_fetched_once(two_sources):
    """Not batch by batch, which would let the devices wait for the host."""
    batches = -(-two_sources.count("held_out") // 16)
    assert batches > 2
    with mock.patch.object(held_out.jax, "device_get", wraps=jax.device_get) as fetched:
        scored_by_ids(two_sources)
    ((figures,), _) = fetched.call_args
    assert fetched.call_count == 1 and len(figures) == batches


@pytest.mark.parametrize("per_device_batch", [1, 100])
def test_batches_are_no_larger_than_the_rows_need(two_sources, per_device_batch):
    """At most four times what training takes, and all alike, to be compiled once."""
    rows = two_sources.count("held_out")
    batches = -(-rows // (4 * 4 * per_device_batch))
    with mock.patch.object(held_out, "held_out_batches", wraps=held_out.held_out_batches) as served:
        scored_by_ids(two_sources, None, per_device_batch)
    at_once = served.call_args.args[1]
    assert -(-rows // at_once) == batches
    assert at_once * batches - rows < 4 * batches, "a mesh of four shards needs no more padding"
