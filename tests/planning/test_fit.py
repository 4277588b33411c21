"""What is tried where a program does not fit, with a compiler that only adds up."""

from types import SimpleNamespace

import pytest

from pangu_tiny.errors import UserError
from pangu_tiny.planning.devices import Compiled, refused
from pangu_tiny.planning.fit import MOST, first_that_fits
from pangu_tiny.planning.programs import Asked
from pangu_tiny.topology.hardware import Hardware

GIB = 2**30
KEPT = {"none": 8, "dots": 4, "attention": 2, "full": 1}
"""A sequence, by what is recomputed."""


def program(hardware):
    """It holds 32 in all, cut over fsdp, and needs 2 for each sequence beside what it keeps."""
    rows = hardware.per_device_batch
    activations, held = KEPT[hardware.remat] * rows, 32 // hardware.fsdp
    mesh = {"data": hardware.data, "fsdp": hardware.fsdp, "tensor": 1}
    return SimpleNamespace(
        mesh=SimpleNamespace(shape=mesh),
        program=SimpleNamespace(hardware=hardware),
        rows=rows,
        accumulation=1,
        held_bytes=held,
        activations=activations,
        need=held + activations + 2 * rows,
    )


def find(capacity, free=("per_device_batch", "mesh", "remat"), refuse=lambda _: False, never=False):
    """The programs that were compiled, as (data, per-device batch, remat), and what was found.

    Args:
      refuse: hardware that the model does not divide by.
      never: every program needs a byte too many.
    """
    compiled = []

    def build(hardware, devices):
        if refuse(hardware):
            raise UserError("it does not divide")
        return program(hardware)

    def compiler(planned):
        hardware = planned.program.hardware
        compiled.append((hardware.data, hardware.per_device_batch, hardware.remat))
        need = capacity + 1 if never else planned.need
        return Compiled(need, 1.0, "text" if need <= capacity else None)

    hardware = Hardware(data=4, fsdp=4, per_device_batch=4, remat="none")
    found = first_that_fits(Asked({}, hardware, free, build, None), (), compiler, capacity)
    return compiled, found


def test_what_fits_is_not_improved():
    compiled, found = find(100)
    assert compiled == [(4, 4, "none")] and found.compiled
    assert [tried.fits for tried in found.tried] == [True]


@pytest.mark.parametrize(
    ("capacity", "first"),
    [
        (47, (4, 4, "dots")),
        (30, (4, 4, "attention")),
        (22, (4, 4, "full")),
        (19, (2, 4, "full")),
        (13, (2, 2, "attention")),
        (5, (1, 1, "full")),
    ],
)
def test_the_fastest_that_fits_is_the_second_that_is_compiled(capacity, first):
    """Recomputation before a mesh that cuts further, that before a smaller batch."""
    compiled, found = find(capacity)
    assert compiled == [(4, 4, "none"), first] and found.compiled
    assert found.tried[1].fits and found.tried[1].need <= capacity
    data, rows, remat = first
    mesh = {"Hardware.data": data, "Hardware.fsdp": 16 // data} if data < 4 else {}
    batch = {"Hardware.per_device_batch": rows} if rows < 4 else {}
    assert found.tried[1].changes == {"Hardware.remat": remat} | batch | mesh
    assert all(out.seconds is None and out.need > capacity for out in found.tried[2:])


def test_where_nothing_fits_the_smallest_is_compiled():
    compiled, found = find(1)
    assert compiled == [(4, 4, "none"), (1, 1, "full")] and found.compiled is None
    assert found.tried[1].need == 5
    compiled, found = find(5, refuse=lambda hardware: hardware.fsdp == 16)
    assert compiled == [(4, 4, "none"), (2, 1, "full")] and found.compiled is None


def test_what_was_expected_wrongly_is_tried_and_there_is_a_limit():
    """Each needs more than there is, however little is known of it before."""
    compiled, found = find(10**6, never=True)
    assert len(compiled) == MOST and found.compiled is None
    assert compiled[:5] == [(4, 4, name) for name in KEPT] + [(2, 4, "full")]


def test_only_what_is_free_is_changed():
    assert find(30, free=())[0] == [(4, 4, "none")]
    compiled, _ = find(30, free=("per_device_batch", "mesh"))
    assert compiled == [(4, 4, "none"), (4, 2, "none")]


def test_only_a_lack_of_memory_is_read_from_a_complaint():
    """In libtpu's own words: of all, and of temporaries alone."""
    known = "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: "
    alone = (
        known + "Ran out of memory on HBM, the total memory required for HLO temporaries (18.01G) "
        "exceeds available HBM (15.75G). HLO module: jit_step."
    )
    assert refused(alone, 2 * GIB) == int(18.01 * GIB) + 2 * GIB
    in_all = (
        known + "XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used "
        "21.36G of 15.75G hbm. Exceeded hbm capacity by 5.61G."
    )
    assert refused(in_all, 2 * GIB) == int(21.36 * GIB)
    assert refused(in_all.replace("hbm", "vmem"), 0) is None
    assert refused(alone.replace("RESOURCE_EXHAUSTED", "INTERNAL"), 0) is None
    assert refused("RESOURCE_EXHAUSTED: no space left on device", 0) is None
