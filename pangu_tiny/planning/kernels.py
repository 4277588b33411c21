"""Cycles of the splash attention kernel, of which the schedule of a step says nothing.

As it starts, libtpu can be told to write how many bundles each program has; a bundle is a cycle of
a core. So the kernel is compiled alone, with the sizes of one chip, in a process of its own. It is
one loop over a grid, whose blocks above the diagonal are skipped: its cycles are bundles × blocks
on and below the diagonal × heads × sequences, shared by the cores of a device. Branches that only
some blocks take are counted in all of them, waits for memory in none.
"""

import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from typing import NamedTuple

from pangu_tiny.errors import UserError

_BUNDLES = re.compile(r"total scheduled bundles:\s+(\d+)")
_FILES = "*schedule-analysis_final_bundles.txt"
_NAME = "splash"


class Attention(NamedTuple):
    """The attention of one chip: sequences and heads that it has, and their sizes."""

    topology: str
    sequences: int
    heads: int
    kv_heads: int
    length: int
    head_dim: int
    block: int

    @property
    def blocks(self) -> int:
        """Blocks on and below the diagonal, of all heads and sequences."""
        side = -(-self.length // self.block)
        return side * (side + 1) // 2 * self.heads * self.sequences


def kernel_cycles(attention: Attention) -> dict[str, int]:
    """Cycles of one core for each of the kernels, forward (alone, and for a backward pass) and
    backward, each time, by its name."""
    with tempfile.TemporaryDirectory() as folder:
        flags = f"--xla_jf_dump_to={folder} --xla_jf_dump_hlo_text=true"
        environment = {"LIBTPU_INIT_ARGS": flags, "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
        command = [sys.executable, "-m", "pangu_tiny.planning.kernels", json.dumps(attention)]
        done = subprocess.run(
            command, env=os.environ | environment, capture_output=True, text=True, check=False
        )
        if done.returncode:
            lines = done.stderr.strip().splitlines() or ["no reason given"]
            raise UserError(f"the attention kernel cannot be compiled alone: {lines[-1]:.300}")
        bundles = read_bundles(pathlib.Path(folder))
    return {name: count * attention.blocks for name, count in bundles.items()}


def read_bundles(folder: pathlib.Path) -> dict[str, int]:
    """Bundles of the kernels in what libtpu wrote, by name."""
    found = {}
    for file in sorted(folder.glob(_FILES)):
        name = re.sub(r"-\d+-schedule.*", "", file.name.partition("-")[2])
        if name.startswith(_NAME) and (match := _BUNDLES.search(file.read_text())):
            found[base_name(name)] = int(match[1])
    return found


def base_name(name: str) -> str:
    """A kernel's name without the number that tells its calls apart."""
    return re.sub(r"\.\d+$", "", name)


def _compile(attention: Attention) -> None:
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.experimental import topologies

    from pangu_tiny.model.kernels import lookup

    devices = topologies.get_topology_desc(attention.topology, platform="tpu").devices
    mesh = jax.sharding.Mesh(np.array(devices[:1]), ("x",))
    layout = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    size = (attention.sequences, attention.length)

    def given(shape: tuple[int, ...], dtype: jnp.dtype) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=layout)

    q = given((*size, attention.heads, attention.head_dim), jnp.bfloat16)
    kv = given((*size, attention.kv_heads, attention.head_dim), jnp.bfloat16)

    def total(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array) -> jax.Array:
        return jnp.sum(lookup("splash")(q, k, v, segments).astype(jnp.float32))

    for program in (lookup("splash"), jax.grad(total, (0, 1, 2))):
        jax.jit(program).lower(q, kv, kv, given(size, jnp.int32)).compile()


if __name__ == "__main__":
    _compile(Attention(*json.loads(sys.argv[1])))
