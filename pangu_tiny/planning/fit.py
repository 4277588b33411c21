"""Where a program does not fit: what would.

Programs are tried in the order in which they are likely to be fast: all that is recomputed before
a smaller batch, since what is recomputed costs computation alone and each halving of the batch
costs every exchange once more; a mesh that cuts parameters further in between. Left out is what
will not fit either: what a program holds and keeps for its backward pass is known before it is
compiled, and what it needs beside that is taken from the last that was compiled, by rows.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from pangu_tiny.errors import UserError
from pangu_tiny.planning.devices import Compiled
from pangu_tiny.planning.programs import Asked, Planned

MOST = 12
"""Programs that are compiled, that which was asked for among them."""
_REMAT = ("none", "dots", "attention", "full")  # as they save less


class Tried(NamedTuple):
    """A program that was compiled, or left out.

    Attributes:
      changes: of bindings, from what was asked for.
      need: bytes of HBM a chip; of what was left out, as expected.
      seconds: to compile; None where it was left out.
      fits: whether it does.
    """

    changes: dict[str, Any]
    need: int
    seconds: float | None
    fits: bool


class Found(NamedTuple):
    """The first program that fits, `compiled`; None where none of those tried does."""

    planned: Planned
    compiled: Compiled | None
    tried: list[Tried]


def first_that_fits(
    asked: Asked,
    devices: Sequence[Any],
    compiler: Callable[[Planned], Compiled],
    capacity: int,
) -> Found:
    """Compiles what was asked for, and others until one fits.

    Args:
      compiler: see `compile_for`.
      capacity: bytes of HBM a chip.
    """
    tried: list[Tried] = []
    compiles = 0
    left_out: list[tuple[int, dict[str, Any], Planned]] = []
    beside = 0.0  # bytes a sequence that are needed beside what is known before

    def attempt(changes: dict[str, Any], planned: Planned) -> Compiled | None:
        nonlocal beside, compiles
        compiled = compiler(planned)
        compiles += 1
        fits = compiled.text is not None and compiled.need <= capacity
        tried.append(Tried(changes, compiled.need, round(compiled.seconds, 1), fits))
        beside = max(0, compiled.need - _known(planned)) / planned.rows
        return compiled if fits else None

    first = asked.build(asked.hardware, devices)
    compiled = attempt({}, first)
    if compiled:
        return Found(first, compiled, tried)
    for changes, planned in _others(asked, first, devices):
        if compiles == MOST:
            break
        expected = int(_known(planned) + beside * planned.rows)
        if expected > capacity:
            left_out.append((expected, changes, planned))
        elif compiled := attempt(changes, planned):
            return Found(planned, compiled, _with(tried, left_out))
    if left_out and compiles < MOST:  # the smallest all the same
        smallest = min(left_out, key=lambda out: out[0])
        left_out.remove(smallest)
        _, changes, planned = smallest
        if compiled := attempt(changes, planned):
            return Found(planned, compiled, _with(tried, left_out))
    return Found(first, None, _with(tried, left_out))


def _known(planned: Planned) -> int:
    return planned.held_bytes + planned.activations


def _with(tried: list[Tried], left_out: list[tuple[int, dict[str, Any], Planned]]) -> list[Tried]:
    return [*tried, *(Tried(changes, need, None, False) for need, changes, _ in left_out)]


def _others(
    asked: Asked, first: Planned, devices: Sequence[Any]
) -> Iterator[tuple[dict[str, Any], Planned]]:
    """Programs by what is changed, the fastest likely first, each once."""
    seen = {_kind(first)}
    hardware = asked.hardware
    for changes in _changes(asked, first):
        names = {name.removeprefix("Hardware."): value for name, value in changes.items()}
        try:
            planned = asked.build(type(hardware)(**vars(hardware) | names), devices)
        except UserError:  # a mesh that does not divide the model, or joins no slices
            continue
        if _kind(planned) not in seen:
            seen.add(_kind(planned))
            yield changes, planned


def _kind(planned: Planned) -> tuple[Any, ...]:
    remat = planned.program.hardware.remat if planned.program else None
    return (*planned.mesh.shape.values(), planned.rows, planned.accumulation, remat)


def _changes(asked: Asked, first: Planned) -> Iterator[dict[str, Any]]:
    hardware, mesh = asked.hardware, first.mesh.shape
    data, fsdp = mesh["data"], mesh["fsdp"]
    batches: list[dict[str, Any]] = [{}]
    meshes: list[dict[str, Any]] = [{}]
    remats: list[dict[str, Any]] = [{}]
    if "per_device_batch" in asked.free:
        bound = hardware.per_device_batch
        halves = itertools.takewhile(lambda size: size > 0, (bound >> n for n in range(1, 32)))
        batches += [{"Hardware.per_device_batch": size} for size in halves]
    if "mesh" in asked.free:
        while data % 2 == 0:
            data, fsdp = data // 2, fsdp * 2
            meshes.append({"Hardware.data": data, "Hardware.fsdp": fsdp})
    if "remat" in asked.free:
        saving = _REMAT.index(hardware.remat) if hardware.remat in _REMAT else 0
        remats += [{"Hardware.remat": remat} for remat in _REMAT[saving + 1 :]]
    for batch, mesh_, remat in itertools.product(batches, meshes, remats):
        if batch or mesh_ or remat:
            yield remat | batch | mesh_
