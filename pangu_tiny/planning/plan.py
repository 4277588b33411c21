"""The stage `plan`: what the train step of gin files will do on a TPU slice, known without one.

libtpu compiles for slices that are not there. The folder that it writes holds

    plan.json       all figures: memory a chip, exchanges, seconds of a step, what a run costs
    report.html     the same, with where the time goes as a picture; written last
"""

import contextlib
import importlib.util
import json
import math
import os
import time
from collections.abc import Iterator
from typing import Any

import jax

from pangu_tiny import config
from pangu_tiny.data.rows import Marks
from pangu_tiny.errors import UserError, check_number, one_line
from pangu_tiny.model.kernels import splash_block
from pangu_tiny.planning import hlo
from pangu_tiny.planning.estimate import (
    collectives_table,
    estimate,
    run_cost,
    seconds_by_part,
)
from pangu_tiny.planning.kernels import Attention, kernel_cycles
from pangu_tiny.planning.report import report_of
from pangu_tiny.planning.schedule import read_schedule
from pangu_tiny.program.build import Program, Training, build, build_training
from pangu_tiny.rounds.stages import settings
from pangu_tiny.topology.mesh import batch_shards
from pangu_tiny.topology.slices import Slice, parse_slice
from pangu_tiny.training.train import train
from pangu_tiny.workdir import claim, environment, read_json, write_atomically

PLAN = "plan.json"
_QUIET = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "none",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
}
"""Settings of libtpu, which else asks a cloud for the machine, and complains that there is none."""
_STEPS = 1000  # where a gin file binds none: no program depends on it but for a constant


def plan(
    topology: str,
    workdir: str,
    sequence_length: int = 2048,
    tokens: float = 1.6e12,
    dcn_rate: float = 6.25e9,
) -> dict[str, Any]:
    """Compiles the train step that is bound (ModelShape, Optimizer, Hardware, train) for a slice.

    Args:
      topology: such as v5e:16x16, a market name such as v5p-256, or 2 × v5e:16x16 for two slices
        that the data-centre network joins.
      workdir: the folder to write.
      sequence_length: of the rows; 2,048 in the paper.
      tokens: of the run whose cost is reckoned; the paper trains on 1.6T.
      dcn_rate: bytes per second that a chip receives from other slices. Chosen as an eighth of
        400 Gbit/s, which eight chips of a host share.

    `train.global_batch` may be unbound: it is then what the devices take at once.
    """
    check_number("plan.sequence_length", sequence_length, 2)
    check_number("plan.tokens", tokens, 1)
    check_number("plan.dcn_rate", dcn_rate, above=0)
    where = parse_slice(topology)
    bound = _train_settings()
    devices = _devices(where)
    shape, hardware = bound["model"], bound["hardware"]
    program = build(shape, hardware, Marks(1, 2), bound["dtype"], bound["z_loss"], devices)
    shards = batch_shards(program.mesh)
    batch = bound["global_batch"] or hardware.per_device_batch * shards
    training = build_training(program, bound["optimizer"], bound["steps"], batch, sequence_length)
    identity = {
        "topology": str(where),
        "sequence_length": sequence_length,
        "global_batch": batch,
        "dtype": bound["dtype"],
        "model": vars(shape),
        "hardware": vars(hardware),
        "tokens": tokens,
        "dcn_rate": dcn_rate,
    }
    folder = claim(workdir, "plan", identity)
    if not (folder / "report.html").exists():
        figures = {**identity, "environment": environment()}
        figures |= _figures(program, training, where, sequence_length, tokens, dcn_rate)
        write_atomically(folder / PLAN, json.dumps(figures, indent=1))
        report_of(figures).write(folder)
    figures = read_json(folder / PLAN)
    print(f"plan {folder / PLAN}: {where}, {where.chips} chips")
    print(report_of(figures).text())
    print(f"  report       {folder / 'report.html'}")
    return figures


def _train_settings() -> dict[str, Any]:
    """All parameters of train as they are bound, with or without a batch and a number of steps."""
    given: dict[str, Any] = {"dataset": "", "workdir": ""}
    for name, value in (("steps", _STEPS), ("global_batch", None)):
        if not config.is_bound(f"train.{name}"):
            given[name] = value
    return settings(train, **given)


def _devices(where: Slice) -> list[Any]:
    """Those of slices that are not there."""
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    options: dict[str, Any] = {"num_slices": where.slices} if where.slices > 1 else {}
    if where.generation == "v4":
        options["chip_config_name"] = "megacore"
    from jax.experimental import topologies

    with _naming_failures(where):
        found = topologies.get_topology_desc(where.topology, platform="tpu", **options)
    return list(found.devices)


@contextlib.contextmanager
def _naming_failures(where: Slice) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # jaxlib's own kinds, for anything that libtpu says
        reason = f"{one_line(error):.300}"
        advice = ""
        if importlib.util.find_spec("libtpu") is None:
            advice = "plan needs libtpu: pip install 'pangu_tiny[plan]'; "
        elif "lock" in reason.lower():
            advice = "another process has libtpu open, wait for its end; "
        raise UserError(f"{where} cannot be planned: {advice}{reason}") from error


def _figures(
    program: Program,
    training: Training,
    where: Slice,
    sequence_length: int,
    tokens: float,
    dcn_rate: float,
) -> dict[str, Any]:
    began = time.monotonic()
    batch = training.layout.abstract(sequence_length)
    with _naming_failures(where), jax.set_mesh(program.mesh):
        compiled = training.step.lower(training.state, batch).compile()
        text = compiled.as_text()
    seconds = time.monotonic() - began
    schedule = read_schedule(hlo.parse(text), where, dcn_rate)
    attention = _attention(program, training, where, sequence_length)
    step = estimate(schedule, where, kernel_cycles(attention) if attention else {})
    tokens_per_step = training.layout.rows * sequence_length
    flops = program.shape.flops_per_token(sequence_length)
    return {
        "compile_seconds": round(seconds, 1),
        "mesh": dict(program.mesh.shape),
        "accumulation": training.layout.accumulation,
        "memory": _memory(training, compiled.memory_analysis(), where),
        "collectives": collectives_table(schedule),
        "step": {**step._asdict(), "total": step.total},
        "parts": seconds_by_part(schedule, where),
        "kernels": [item._asdict() for item in schedule.kernels],
        "unknown_loops": schedule.unknown_loops,
        "run": run_cost(step.total, tokens_per_step, flops, where, tokens),
    }


def _attention(
    program: Program, training: Training, where: Slice, sequence_length: int
) -> Attention | None:
    """What the attention kernel of one chip does; None where there is no kernel."""
    if program.hardware.attention != "splash":
        return None
    shape, mesh = program.shape, program.mesh
    tensor = mesh.shape["tensor"]
    return Attention(
        where.topology,
        training.layout.rows_at_once // batch_shards(mesh),
        shape.heads // tensor,
        shape.kv_heads // tensor,
        sequence_length,
        shape.head_dim,
        splash_block(sequence_length),
    )


def _memory(training: Training, analysis: Any, where: Slice) -> dict[str, int]:
    """Bytes a chip."""

    def held(tree: Any) -> int:
        leaves = jax.tree.leaves(tree)
        sizes = (leaf.sharding.shard_shape(leaf.shape) for leaf in leaves)
        return sum(
            leaf.dtype.itemsize * math.prod(size) for leaf, size in zip(leaves, sizes, strict=True)
        )

    return {
        "capacity": where.chip.memory,
        "parameters": held(training.state.params),
        "optimizer": held(training.state.optimizer),
        "temporaries": analysis.temp_size_in_bytes,
        "code": analysis.generated_code_size_in_bytes,
    }
