"""From a compiled step to the seconds that it takes, by what they go to, and what a run costs."""

import collections
import math
import re
from typing import Any, NamedTuple

from pangu_tiny.planning.collectives import Collective
from pangu_tiny.planning.kernels import base_name
from pangu_tiny.planning.schedule import Schedule
from pangu_tiny.topology.slices import Slice

RULES = (
    "products and passes over memory: the compiler's own cycles of every instruction with and "
    "without a matrix product in it, times the turns of its loops",
    "exposed: link time less the cycles between start and end, at least 0; synchronous ones whole",
    "link time: bytes that a chip must receive / (links of the worst placed chip × their rate)",
    "attention kernel: its bundles, compiled alone, × blocks on and below the diagonal × heads × "
    "sequences / cores of a device; branches of some blocks count in all, waits for memory in none",
    "other kernels, and instructions without an estimate: at least bytes / memory rate, so that "
    "the total is a lower bound where there are any",
)

_PARTS = {
    "rotary": r"rope|apply_rope",
    "attention": r"blocks/attention\b|splash|attention_output",
    "shortcut": r"blocks/shortcut",
    "feed-forward": r"blocks/ffn\b",
    "norms": r"_norm\b",
    "loss": r"cross_entropy",
    "embedding": r"embedding|take|gather",
    "rest of the blocks": r"Decoder",
}
"""Part of the model → what its operations are called, the first that fits."""


class Estimate(NamedTuple):
    """Seconds of a step by what they go to; those of `at_least` are bounds."""

    products: float
    passes: float
    kernels: float
    exposed_ici: float
    exposed_dcn: float
    waits: float
    at_least: float

    @property
    def total(self) -> float:
        return sum(self)


def estimate(schedule: Schedule, where: Slice, kernel_cycles: dict[str, int]) -> Estimate:
    """The seconds of a step.

    Args:
      kernel_cycles: of one core, each time, by the names of those kernels that were counted.
    """
    chip = where.chip
    exposed = {"ICI": 0.0, "DCN": 0.0}
    for found in schedule.collectives:
        exposed[found.network] += found.exposed * found.times
    counted = [item for item in schedule.kernels if base_name(item.name) in kernel_cycles]
    cycles = sum(kernel_cycles[base_name(item.name)] * item.times for item in counted)
    others = [item for item in schedule.kernels if item not in counted]
    uncosted = sum(item.bytes * item.times for item in (*others, *schedule.uncosted))
    products = sum(item.cycles * item.times for item in schedule.work if item.product)
    return Estimate(
        products / chip.clock,
        (schedule.cycles - products) / chip.clock,
        cycles / chip.cores / chip.clock,
        exposed["ICI"],
        exposed["DCN"],
        schedule.waits,
        uncosted / chip.memory_rate,
    )


def seconds_by_part(schedule: Schedule, where: Slice) -> dict[str, float]:
    """Computation alone, largest first."""
    seconds: Any = collections.Counter()
    for item in schedule.work:
        seconds[_part_of(item.op_name)] += item.cycles * item.times / where.chip.clock
    return dict(seconds.most_common())


def collectives_table(schedule: Schedule) -> list[dict[str, Any]]:
    """Exchanges summed up by kind, type, network and whether they are synchronous."""
    groups: dict[tuple[Any, ...], list[Collective]] = {}
    for found in schedule.collectives:
        key = (found.kind, found.dtype, found.network, found.synchronous)
        groups.setdefault(key, []).append(found)
    rows = [
        {
            "kind": kind,
            "dtype": dtype,
            "network": network,
            "synchronous": synchronous,
            "times": sum(item.times for item in items),
            "bytes": sum(item.bytes * item.times for item in items),
            "seconds": sum(item.seconds * item.times for item in items),
            "exposed": sum(item.exposed * item.times for item in items),
        }
        for (kind, dtype, network, synchronous), items in groups.items()
    ]
    return sorted(rows, key=lambda row: -row["exposed"])


def run_cost(
    step_seconds: float,
    tokens_per_step: int,
    flops: int,
    peak: float,
    chips: int,
    tokens: float | None,
) -> dict[str, float]:
    """The speed of steps, and what a run of so many tokens takes, if every step takes as long.

    Args:
      flops: of a step.
      peak: operations per second of one chip.
      tokens: None where a run has no end of its own.
    """
    speed = {
        "tokens_per_second": tokens_per_step / step_seconds,
        "mfu": flops / (step_seconds * chips * peak),
    }
    if tokens is None:
        return speed
    steps = math.ceil(tokens / tokens_per_step)
    seconds = steps * step_seconds
    return {
        **speed,
        "tokens": tokens,
        "steps": steps,
        "days": seconds / 86_400,
        "chip_hours": seconds / 3_600 * chips,
    }


def _part_of(op_name: str) -> str:
    for part, pattern in _PARTS.items():
        if re.search(pattern, op_name):
            return part
    return "optimizer and all else"
