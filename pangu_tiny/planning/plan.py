"""The stage `plan`: what a program of gin files will do on a TPU slice, known without one.

libtpu compiles for slices that are not there. The folder that it writes holds

    plan.json       all figures: memory a chip, exchanges, seconds of a step, what a run costs
    report.html     the same, with where the time goes as a picture; written last
"""

import importlib.metadata
import json
from typing import Any

from pangu_tiny.errors import UserError, check_number
from pangu_tiny.model.layout import thin_shards
from pangu_tiny.planning import hlo
from pangu_tiny.planning.collectives import Placed
from pangu_tiny.planning.devices import Compiled, compile_for, devices_of
from pangu_tiny.planning.estimate import collectives_table, estimate, run_cost, seconds_by_part
from pangu_tiny.planning.fit import first_that_fits
from pangu_tiny.planning.kernels import kernel_cycles
from pangu_tiny.planning.memory import split
from pangu_tiny.planning.programs import Planned, ask
from pangu_tiny.planning.report import report_of
from pangu_tiny.planning.schedule import read_schedule
from pangu_tiny.topology.slices import Slice, parse_slice
from pangu_tiny.workdir import claim, environment, read_json, write_atomically

PLAN = "plan.json"


def plan(
    workdir: str,
    topology: str | None = None,
    program: str = "train",
    teacher: str | None = None,
    sequence_length: int = 2048,
    tokens: float = 1.6e12,
    dcn_rate: float = 6.25e9,
) -> dict[str, Any]:
    """Compiles what a stage runs, by what is bound for it (ModelShape, Hardware, Optimizer, train,
    score_batches, rank_teacher, generate), for a slice; where that does not fit, what would.

    Args:
      workdir: the folder to write.
      topology: such as v5e:16x16, a market name such as v5p-256, or 2 × v5e:16x16 for two slices
        that the data-centre network joins; None takes Hardware.topology.
      program: "train" is a step of train, "score" one of score-batches, "rank" a batch of
        rank-teacher by its method, "decode" a token of every sequence of a
        batch of generate.
      teacher: gin file of the shape of the teacher, such as models/llama_2_7b.gin; for "rank".
      sequence_length: of the rows, or of the cache; 2,048 in the paper.
      tokens: of the run whose cost is reckoned; the paper trains on 1.6T.
      dcn_rate: bytes per second that a chip receives from other slices. Chosen as an eighth of
        400 Gbit/s, which eight chips of a host share.

    `train.global_batch` may be unbound: it is then what the devices take at once.
    """
    check_number("plan.sequence_length", sequence_length, 2)
    check_number("plan.tokens", tokens, 1)
    check_number("plan.dcn_rate", dcn_rate, above=0)
    asked = ask(program, sequence_length, tokens, teacher)
    where = _slice(topology or asked.hardware.topology)
    devices = devices_of(where)
    asked.build(asked.hardware, devices)  # mistakes, before there is a folder
    identity = {
        "topology": str(where),
        "program": program,
        "sequence_length": sequence_length,
        **asked.identity,
        "tokens": tokens,
        "dcn_rate": dcn_rate,
    }
    folder = claim(workdir, "plan", identity)
    if not (folder / "report.html").exists():
        found = first_that_fits(
            asked, devices, lambda planned: compile_for(planned, where), where.chip.memory
        )
        figures = {**identity, "environment": environment(), "capacity": where.chip.memory}
        figures["environment"]["versions"]["libtpu"] = importlib.metadata.version("libtpu")
        figures["tried"] = [tried._asdict() for tried in found.tried]
        if found.compiled:
            figures |= _figures(found.planned, found.compiled, where, asked.tokens, dcn_rate)
        write_atomically(folder / PLAN, json.dumps(figures, indent=1))
        report_of(figures).write(folder)
    figures = read_json(folder / PLAN)
    print(f"plan {folder / PLAN}: {where}, {where.chips} chips")
    print(report_of(figures).text())
    print(f"  report       {folder / 'report.html'}")
    return figures


def _slice(topology: str | None) -> Slice:
    if topology is None:
        raise UserError(
            "plan.topology is None, and so is Hardware.topology: expected a TPU slice, such as "
            "v5e-256 or v5e:16x16"
        )
    return parse_slice(topology)


def _figures(
    planned: Planned, compiled: Compiled, where: Slice, tokens: float | None, dcn_rate: float
) -> dict[str, Any]:
    chips = [device.coords for device in planned.mesh.devices.flat]
    schedule = read_schedule(hlo.parse(compiled.text), Placed(where, dcn_rate, chips))
    attention = planned.attention(where)
    step = estimate(schedule, where, kernel_cycles(attention) if attention else {})
    code = compiled.analysis.generated_code_size_in_bytes
    return {
        "compile_seconds": round(compiled.seconds, 1),
        "mesh": dict(planned.mesh.shape),
        "global_batch": planned.sequences,
        "accumulation": planned.accumulation,
        "thin_shards": thin_shards(planned.program.shape, planned.mesh),
        "memory": split(compiled.need, code, planned.held, planned.activations, where),
        "collectives": collectives_table(schedule),
        "step": {**step._asdict(), "total": step.total},
        "parts": seconds_by_part(schedule, where),
        "kernels": [item._asdict() for item in schedule.kernels],
        "unknown_loops": schedule.unknown_loops,
        "run": run_cost(
            step.total,
            planned.tokens,
            planned.flops,
            where.chip.peak,
            planned.mesh.size,
            tokens,
        ),
    }
