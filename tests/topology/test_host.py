"""Where JAX will compute, told without asking it."""

import importlib.util

import jax
import pytest

from pangu_tiny.topology.host import computes_on_cpu


@pytest.mark.parametrize(
    ("platforms", "installed", "files", "on_cpu"),
    [
        ("", ["libtpu", "jax_cuda13_plugin"], [], True),  # beside a CPU run
        ("", ["libtpu"], ["vfio/vfio"], True),  # of virtual machines, not of a TPU
        ("", ["libtpu"], ["accel0"], False),
        ("", ["libtpu"], ["vfio/0"], False),
        ("", ["libtpu"], ["nvidia0"], True),  # JAX cannot use it
        ("", ["jax_cuda13_plugin"], ["nvidia0"], False),
        ("", ["jax_cuda12_plugin"], ["dxg"], False),
        ("", [], ["nvidia0", "accel0"], True),
        ("cpu", ["libtpu"], ["accel0"], True),
        ("cpu,cuda", ["jax_cuda13_plugin"], ["nvidia0"], True),
        ("cuda,cpu", ["jax_cuda13_plugin"], ["nvidia0"], False),
    ],
)
def test_the_device_decides_and_not_what_is_installed(
    tmp_path, monkeypatch, platforms, installed, files, on_cpu
):
    for file in files:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).touch()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name in installed)
    before = jax.config.jax_platforms
    jax.config.update("jax_platforms", platforms)
    try:
        assert computes_on_cpu(tmp_path) == on_cpu
    finally:
        jax.config.update("jax_platforms", before)
