"""What a traced program does: its equations, those of inner programs included."""

import math
from collections.abc import Iterator
from typing import Any

import jax.extend


def equations(jaxpr: Any, times: int = 1) -> Iterator[tuple[Any, int]]:
    """Every equation, and how often it runs (the body of a scan: as often as the scan is long)."""
    for equation in jaxpr.eqns:
        yield equation, times
        length = equation.params["length"] if equation.primitive.name == "scan" else 1
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
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
