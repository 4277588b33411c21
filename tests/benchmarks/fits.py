"""Every pod recipe on every TPU slice that has a hardware file: compiled, and does it fit?

python tests/benchmarks/fits.py --out=FOLDER [--only=TEXT] [--largest] [--table=FILE] [--headers]

One plan after the other, each 2 to 3 minutes in a process of its own; what FOLDER has is not made
again. The table is Markdown; exit code 1 where a program does not compile, or leaves less than 10 %
of the HBM free. --only plans those whose name has TEXT, such as 1b_pro-v5e. --largest also plans
the largest batch that a hardware file allows, where the recipe gives a chip less. --headers writes
what was found into the headers of the hardware files.
"""

import argparse
import json
import os
import pathlib
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

from pangu_tiny import config
from pangu_tiny.topology.hardware import Hardware
from pangu_tiny.topology.slices import parse_slice

FREE = 0.1
"""Share of the HBM that is to be left."""
GIB = 2**30
COLUMNS = (
    "recipe", "hardware", "mesh", "batch a chip", "HBM GiB a chip", "products", "passes",
    "attention kernel", "exposed exchanges", "step ms", "MFU", "days for 1.6T tokens",
    "compiled in s", "peak host GiB",
)  # fmt: skip


class Combination(NamedTuple):
    """A recipe and a hardware file, by the names of their files; the largest batch, or that of the
    recipe."""

    recipe: str
    hardware: str
    largest: bool = False

    @property
    def name(self) -> str:
        return f"{self.recipe}-{self.hardware}" + ("-largest" if self.largest else "")


class Planned(NamedTuple):
    """plan.json, the peak memory of the process that wrote it, and the day on which it did."""

    figures: dict[str, Any]
    host_gib: float
    day: str

    @property
    def used(self) -> float:
        """Bytes of HBM of the program that was asked for."""
        return self.figures["tried"][0]["need"]

    @property
    def fits(self) -> bool:
        return self.used <= (1 - FREE) * self.figures["capacity"]


def combinations(largest: bool) -> Iterator[Combination]:
    shipped = config.shipped_files()
    for recipe in sorted(shipped.glob("recipes/pangu_pi_*.gin"), key=lambda file: len(file.stem)):
        for hardware in sorted(shipped.glob("hardware/v*.gin")):
            yield Combination(recipe.stem, hardware.stem)
            if largest:
                yield Combination(recipe.stem, hardware.stem, True)


def command(combination: Combination, workdir: pathlib.Path) -> list[str]:
    """The command that plans it."""
    recipe, name, largest = combination
    flags = [
        f"--gin_file=recipes/{recipe}.gin",
        f"--gin_file=hardware/{name}.gin",
        f"--gin.plan.workdir={workdir}",
    ]
    if largest:
        hardware = config.build(Hardware, f"hardware/{name}.gin")
        batch = hardware.per_device_batch * parse_slice(hardware.topology).chips
        flags.append(f"--gin.train.global_batch={batch}")
    return [sys.executable, "-m", "pangu_tiny", "plan", *flags]


def plan(combination: Combination, out: pathlib.Path) -> Planned | str:
    """What a plan says, which is made unless it is there; where it cannot be made, why."""
    workdir, measured = out / combination.name, out / f"{combination.name}.json"
    if not (measured.exists() and (workdir / "plan.json").exists()):
        environment = os.environ | {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
        with (out / f"{combination.name}.log").open("w+") as log:
            child = subprocess.Popen(
                command(combination, workdir), stdout=log, stderr=subprocess.STDOUT, env=environment
            )
            _, status, usage = os.wait4(child.pid, 0)
            child.returncode = os.waitstatus_to_exitcode(status)
            if child.returncode:
                log.seek(0)
                last = (log.read().strip().splitlines() or ["nothing said"])[-1]
                return f"exit code {child.returncode}, {last}"
        facts = {"host_gib": usage.ru_maxrss / 2**20, "day": time.strftime("%Y-%m-%d")}
        measured.write_text(json.dumps(facts))
    figures = json.loads((workdir / "plan.json").read_text())
    return Planned(figures, **json.loads(measured.read_text()))


def row(combination: Combination, planned: Planned | str) -> tuple[str, ...]:
    cells = (combination.recipe, combination.hardware)
    if isinstance(planned, str):
        return (*cells, f"not planned: {planned}", *[""] * (len(COLUMNS) - 3))
    figures, used = planned.figures, f"{planned.used / GIB:.1f}"
    used += f" of {figures['capacity'] / GIB:.0f}" + ("" if planned.fits else ", **too much**")
    if not figures["tried"][0]["fits"]:  # what else is in the plan is of another program
        return (*cells, "", "", used, *[""] * (len(COLUMNS) - 5))
    mesh, step = figures["mesh"], figures["step"]
    exposed = step["exposed_ici"] + step["exposed_dcn"]
    parts = (step["products"], step["passes"], step["kernels"], exposed, step["total"])
    chips, run = mesh["data"] * mesh["fsdp"], figures["run"]
    return (
        *cells,
        " × ".join(str(size) for size in mesh.values() if size > 1),
        f"{figures['global_batch'] / chips:.0f}",
        used,
        *(f"{1e3 * seconds:.0f}" for seconds in parts),
        f"{run['mfu']:.1%}",
        f"{run['days']:.1f}",
        f"{figures['compile_seconds']:.0f}",
        f"{planned.host_gib:.1f}",
    )


def same_batch(planned: Planned | str, combination: Combination) -> bool:
    """Whether the recipe gives a chip as much as the hardware file allows."""
    if isinstance(planned, str):
        return False
    mesh, hardware = planned.figures["mesh"], planned.figures["hardware"]
    share = planned.figures["global_batch"] // (mesh["data"] * mesh["fsdp"])
    return share >= hardware["per_device_batch"]


def write_header(combination: Combination, planned: Planned) -> None:
    """Into the hardware file, in the line of the recipe."""
    figures = planned.figures
    file = config.shipped_files() / "hardware" / f"{combination.hardware}.gin"
    mesh = figures["mesh"]
    rows = figures["global_batch"] // (mesh["data"] * mesh["fsdp"])
    said = (
        f"{rows} sequences a chip, {planned.used / GIB:.1f} GiB, "
        f"{1e3 * figures['step']['total']:.0f} ms, MFU {figures['run']['mfu']:.1%}, {planned.day}"
    )
    line = rf"(?m)^#   recipes/{re.escape(combination.recipe)}\.gin: .*$"
    text, count = re.subn(line, f"#   recipes/{combination.recipe}.gin: {said}", file.read_text())
    if count != 1:
        sys.exit(f"{file} has {count} lines for recipes/{combination.recipe}.gin, expected one")
    file.write_text(text)


def main(options: argparse.Namespace) -> int:
    out = options.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    rows, failed, asked = [], [], None
    for combination in combinations(options.largest):
        if options.only not in combination.name:
            continue
        if combination.largest and asked is not None and same_batch(asked, combination):
            continue
        print(f"{combination.name} …", file=sys.stderr, flush=True)
        planned = plan(combination, out)
        if not combination.largest:
            asked = planned
        rows.append(row(combination, planned))
        if isinstance(planned, str) or not planned.fits:
            failed.append(combination.name)
        elif options.headers and not combination.largest:
            write_header(combination, planned)
    lines = [COLUMNS, ("---",) * len(COLUMNS), *rows]
    table = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    if options.table:
        options.table.write_text(table)
    else:
        print(table, end="")
    if failed:
        print(f"not planned, or less than {FREE:.0%} free: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed or not rows else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--only", default="")
    parser.add_argument("--largest", action="store_true")
    parser.add_argument("--table", type=pathlib.Path)
    parser.add_argument("--headers", action="store_true")
    sys.exit(main(parser.parse_args()))
