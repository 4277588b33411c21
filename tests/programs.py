"""What a program does: the equations of one that was traced, those of inner programs included, and
what devices exchange in one that was cut for a mesh."""

import math
import pathlib
import re
from collections.abc import Iterator
from typing import Any

import jax
import jax.extend


def equations(jaxpr: Any, times: int = 1) -> Iterator[tuple[Any, int]]:
    """Every equation, and how often it runs (the body of a scan: as often as the scan is long). Of
    branches, which here are those of platforms, the last: what all run that are not named."""
    for equation in jaxpr.eqns:
        yield equation, times
        length = equation.params["length"] if equation.primitive.name == "scan" else 1
        inner_programs = list(jax.extend.core.jaxprs_in_params(equation.params))
        for inner in inner_programs[-1:] if equation.primitive.name == "cond" else inner_programs:
            yield from equations(inner, times * length)


def matmul_flops(jaxpr: Any) -> int:
    """Multiplications and additions in all matrix products."""
    total = 0
    for equation, times in equations(jaxpr):
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            shared = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
            total += times * 2 * shared * math.prod(equation.outvars[0].aval.shape)
    return total


def exchanged(lowered: jax.stages.Lowered, folder: pathlib.Path) -> set[tuple[str, str, int]]:
    """Every kind of exchange between devices: its name, and dtype and elements of what a device
    gets, as the partitioner lays it out. Compiled further for a CPU, all would be float32.

    Args:
      lowered: not compiled before, else the cache of `conftest.py` has it.
      folder: an empty one, for files of the compiler.
    """
    lowered.compile(
        compiler_options={"xla_dump_to": str(folder), "xla_dump_hlo_pass_re": "spmd-partitioning"}
    )
    (file,) = folder.glob("*after_spmd-partitioning*.txt")
    found = re.findall(
        r" = (\w+)\[([\d,]*)\]\S* (all-gather|all-reduce|reduce-scatter|all-to-all)\(",
        file.read_text(),
    )
    return {
        (name, dtype, math.prod(map(int, filter(None, sizes.split(",")))))
        for dtype, sizes, name in found
    }
