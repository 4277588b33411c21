"""What the train step of 1B Pro exchanges on v5e:4x4, two of its layers deep, as JSON; run as a
process of its own: python tests/planning/scheduled.py [MUTANT].

libtpu knows this once it has scheduled the program, in a twentieth of the time that it then takes
to write instructions; this process waits for no more.
"""

import json
import os
import pathlib
import sys
import tempfile
import threading

import jax
import jax.numpy as jnp

from pangu_tiny import config
from pangu_tiny.cli import find_stage
from pangu_tiny.planning import hlo
from pangu_tiny.planning.collectives import Placed
from pangu_tiny.planning.devices import devices_of
from pangu_tiny.planning.programs import ask
from pangu_tiny.planning.schedule import read_schedule
from pangu_tiny.topology import reduction
from pangu_tiny.topology.slices import parse_slice

DEPTH = 2
BINDINGS = {
    "ModelShape.depth": DEPTH,
    "Hardware.fsdp": 16,
    "Hardware.per_device_batch": 4,
    "Hardware.attention": "splash",
    "Hardware.remat": "dots",
}


def in_bfloat16(x, axis, dimension):
    """Instead of the ring, as commit 33cf18b had it; libtpu makes an all-reduce of it."""
    x16 = x.astype(jnp.bfloat16)
    sums = jax.lax.psum_scatter(x16, axis, scatter_dimension=dimension, tiled=True)
    return sums.astype(x.dtype)


MUTANTS = {"in_bfloat16": in_bfloat16}


def main(mutant=None):
    if mutant:
        reduction.ring_reduce_scatter = MUTANTS[mutant]
    bindings = [(name, str(value)) for name, value in BINDINGS.items()]
    config.read([find_stage("train")], ["models/pangu_pi_1b_pro.gin"], bindings)
    where = parse_slice("v5e:4x4")
    asked = ask("train", 2048, 1e12, None)
    planned = asked.build(asked.hardware, devices_of(where))
    with jax.set_mesh(planned.mesh):
        lowered = planned.function.lower(*planned.arguments, **planned.settings)
    with tempfile.TemporaryDirectory() as folder:
        options = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        compiling = threading.Thread(target=lowered.compile, args=(options,), daemon=True)
        compiling.start()
        text = wait_for_text(pathlib.Path(folder), compiling)
    chips = [device.coords for device in planned.mesh.devices.flat]
    schedule = read_schedule(hlo.parse(text), Placed(where, 1e9, chips))
    assert not schedule.unknown_loops
    print(json.dumps([found._asdict() for found in schedule.collectives]), flush=True)
    os._exit(0)  # with what is still compiled


def wait_for_text(folder, compiling):
    """The program with its exchanges in their order; a text ends with the entry computation."""
    while True:
        ended = not compiling.is_alive()
        for file in folder.glob("*.after_optimizations_after_buffer_assignment.txt"):
            text = file.read_text()
            if "\nENTRY " in text and text.rstrip("\n").endswith("\n}"):
                return text
        if ended:
            sys.exit("libtpu wrote no program")
        compiling.join(timeout=0.1)


if __name__ == "__main__":
    main(*sys.argv[1:])
