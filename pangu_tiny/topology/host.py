"""What a CPU has to be told to be fast."""

import contextlib
import ctypes
import importlib.util

import jax

_MMAP_MAX, _TRIM_THRESHOLD, _ARENA_MAX = -4, -1, -8  # of mallopt(3)
_ACCELERATORS = ("libtpu", "jax_cuda13_plugin", "jax_cuda12_plugin", "jax_rocm7_plugin")


def keep_freed_memory() -> None:
    """Lets glibc keep freed buffers, where JAX will compute on the CPU; elsewhere does nothing.

    XLA allocates its scratch space anew in each call, and glibc by default takes large blocks from
    the system and gives them back, so that every step faults all of its pages in again. The price
    is that the process keeps its peak of memory. It has no effect once JAX has started its
    threads, so it must not ask JAX where it computes: it goes by the platform that was set, or by
    what is installed.
    """
    if jax.config.jax_platforms:
        on_cpu = jax.config.jax_platforms == "cpu"
    else:
        on_cpu = not any(map(importlib.util.find_spec, _ACCELERATORS))
    if not on_cpu:
        return
    with contextlib.suppress(OSError, AttributeError):  # another C library has no mallopt
        libc = ctypes.CDLL(None)
        libc.mallopt(_MMAP_MAX, 0)
        libc.mallopt(_TRIM_THRESHOLD, -1)
        libc.mallopt(_ARENA_MAX, 1)
