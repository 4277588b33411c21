"""Hardware files meet the devices that are there."""

from types import SimpleNamespace

import jax
import pytest

from pangu_tiny.errors import UserError
from pangu_tiny.topology.hardware import Hardware


def devices(kind, count):
    return [SimpleNamespace(device_kind=kind)] * count


@pytest.mark.parametrize(
    ("topology", "kind", "count"),
    [
        ("v5e-256", "TPU v5 lite", 256),
        ("v5p-256", "TPU v5", 128),
        ("v5p-256", "TPU v5p", 128),
        ("2 × v5e:2x2", "TPU v5 lite", 8),
        (None, "cpu", 3),
    ],
)
def test_the_slice_that_a_file_is_for(topology, kind, count):
    Hardware(topology=topology).check_devices(devices(kind, count))


@pytest.mark.parametrize(
    ("kind", "count"), [("TPU v5 lite", 128), ("TPU v5", 256), ("TPU v6 lite", 256)]
)
def test_another_slice_is_refused(kind, count):
    with pytest.raises(UserError, match=f"256 × TPU v5 lite, but JAX found {count} × {kind}"):
        Hardware(topology="v5e-256").check_devices(devices(kind, count))


def test_a_laptop_is_no_slice():
    with pytest.raises(UserError, match="JAX found 8 × cpu"):
        Hardware(topology="v5e:2x4").check_devices(jax.devices())
