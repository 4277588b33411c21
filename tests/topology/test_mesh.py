"""The mesh and its rules: its sizes, and which axes lie where."""

import types

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from pangu_tiny.errors import UserError
from pangu_tiny.model.decoder import PARAMETER_AXES
from pangu_tiny.topology.hardware import Hardware
from pangu_tiny.topology.mesh import (
    RULES,
    batch_shards,
    constrain,
    make_mesh,
    named_sharding,
    partition_spec,
)


@pytest.mark.parametrize(
    ("asked", "made"),
    [
        ((1, -1, 1), (1, 8, 1)),
        ((-1, 1, 2), (4, 1, 2)),
        ((2, 2, -1), (2, 2, 2)),
        ((1, 4, 2), (1, 4, 2)),
        ((8, -1, 1), (8, 1, 1)),
    ],
)
def test_sizes_of_a_mesh(asked, made):
    mesh = make_mesh(*asked)
    assert tuple(mesh.shape.values()) == made
    assert mesh.axis_names == ("data", "fsdp", "tensor")
    assert batch_shards(mesh) == made[0] * made[1]
    assert len({device.id for device in mesh.devices.flat}) == 8


def test_a_mesh_of_chosen_devices():
    assert make_mesh(1, 2, 1, jax.devices()[:2]).size == 2


@pytest.mark.parametrize("sizes", [(3, -1, 1), (1, 4, 1), (2, 8, 1), (-1, -1, 1), (0, -1, 1)])
def test_sizes_that_do_not_fit_are_refused(sizes):
    named = " × ".join(map(str, sizes))
    with pytest.raises(UserError, match=f"Hardware.data × fsdp × tensor = {named}"):
        make_mesh(*sizes)


def test_sizes_below_minus_one_are_refused():
    """−2 · −4 is 8 devices too."""
    with pytest.raises(UserError, match="expected positive sizes"):
        make_mesh(-2, -4, 1)


def test_rules_name_every_axis_that_is_cut():
    """A parameter whose two axes lie on one mesh axis could not be laid out at all."""
    for name, axes in PARAMETER_AXES.items():
        used = [mesh_axis for axis in axes for mesh_axis in RULES.get(axis, ())]
        assert len(used) == len(set(used)), name
        if name not in ("blocks/ffn/series_scale", "blocks/ffn/series_bias"):
            assert "fsdp" in used, f"{name} would lie on every device in full"


def test_partition_spec_of_parameters_and_activations():
    assert partition_spec(("layer", "embed", "heads", "head_dim")) == PartitionSpec(
        None, ("fsdp",), ("tensor",), None
    )
    assert partition_spec(("vocab", "embed")) == PartitionSpec(("tensor",), ("fsdp",))
    assert partition_spec(("batch", None)) == PartitionSpec(("data", "fsdp"), None)
    assert partition_spec(()) == PartitionSpec()


def test_constrain_does_nothing_without_a_mesh_and_lays_out_with_one():
    x = jnp.zeros((8, 3, 4))
    assert constrain(x, "batch", None, "heads") is x
    mesh = make_mesh(1, 4, 2)
    with jax.set_mesh(mesh):
        found = jax.jit(lambda x: constrain(x, "batch", None, "heads"))(x)
    expected = named_sharding(mesh, ("batch", None, "heads"))
    assert found.sharding.is_equivalent_to(expected, x.ndim)


@pytest.mark.parametrize(
    "bad", [{"per_device_batch": 0}, {"loss_chunk": 0}, {"unroll": -1}], ids=str
)
def test_bad_hardware_is_refused_by_name(bad):
    ((name, value),) = bad.items()
    with pytest.raises(UserError, match=rf"Hardware\.{name} is {value}"):
        Hardware(**bad)


def test_slices_are_joined_along_data_alone():
    """Devices of two TPU slices, as far as a refusal looks at them."""
    devices = [types.SimpleNamespace(platform="tpu", slice_index=i // 4) for i in range(8)]
    with pytest.raises(UserError, match=r"Hardware.data is 1, expected a multiple of the 2 slices"):
        make_mesh(1, -1, 1, devices)
