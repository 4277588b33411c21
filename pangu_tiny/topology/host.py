"""What a CPU has to be told to be fast."""

import contextlib
import ctypes
import importlib.util
import pathlib

import jax

_MMAP_MAX, _TRIM_THRESHOLD, _ARENA_MAX = -4, -1, -8  # of mallopt(3)

_TPU, _NVIDIA, _AMD = ("accel*", "vfio/[0-9]*"), ("nvidia*", "dxg"), ("kfd",)
_ACCELERATORS = {
    "libtpu": _TPU,
    "jax_cuda12_plugin": _NVIDIA,
    "jax_cuda13_plugin": _NVIDIA,
    "jax_rocm7_plugin": _AMD,
}
"""The package that makes JAX compute on a device, and the files below /dev of that device."""


def keep_freed_memory() -> None:
    """Lets glibc keep freed buffers, where JAX will compute on the CPU; elsewhere does nothing.

    XLA allocates its scratch space anew in each call, and glibc by default takes large blocks from
    the system and gives them back, so that every step faults all of its pages in again. The price
    is that the process keeps its peak of memory. It has no effect once JAX has started its threads.
    """
    if not computes_on_cpu():
        return
    with contextlib.suppress(OSError, AttributeError):  # another C library has no mallopt
        libc = ctypes.CDLL(None)
        libc.mallopt(_MMAP_MAX, 0)
        libc.mallopt(_TRIM_THRESHOLD, -1)
        libc.mallopt(_ARENA_MAX, 1)


def computes_on_cpu(devices: pathlib.Path = pathlib.Path("/dev")) -> bool:
    """Whether JAX will compute on the CPU, found out without starting JAX: by the platform that was
    set, else by accelerators that are there (`devices` has their files) and that JAX can use."""
    if platforms := jax.config.values["jax_platforms"]:
        return platforms.split(",")[0] == "cpu"
    return not any(
        importlib.util.find_spec(package) and any(devices.glob(pattern))
        for package, patterns in _ACCELERATORS.items()
        for pattern in patterns
    )
