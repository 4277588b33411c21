"""A plan as a few lines, and as a page."""

from typing import Any

from matplotlib.figure import Figure

from pangu_tiny.page import Report, paragraph, picture, section, table
from pangu_tiny.planning.estimate import RULES

_GIB = 2**30
_STEP = {
    "compute": "computation",
    "kernels": "attention kernel",
    "exposed_ici": "exposed exchanges, ICI",
    "exposed_dcn": "exposed exchanges, DCN",
    "waits": "waits for copies to fast memory",
    "at_least": "what has no estimate, at least",
}


def report_of(figures: dict[str, Any]) -> Report:
    memory, step, run = figures["memory"], figures["step"], figures["run"]
    used = sum(size for name, size in memory.items() if name != "capacity")
    mesh = " × ".join(f"{axis} {size}" for axis, size in figures["mesh"].items())
    bound = "at least " if step["at_least"] else ""
    facts = {
        "mesh": f"{mesh}, accumulated {figures['accumulation']} times",
        "memory": f"{used / _GIB:.2f} of {memory['capacity'] / _GIB:.0f} GiB a chip: "
        + ", ".join(f"{k} {v / _GIB:.2f}" for k, v in memory.items() if k != "capacity"),
        "step": f"{bound}{1e3 * step['total']:.1f} ms: "
        + ", ".join(f"{_STEP[k]} {1e3 * v:.1f}" for k, v in step.items() if k in _STEP),
        "speed": f"at most {run['tokens_per_second']:,.0f} tokens/s, MFU {run['mfu']:.1%}",
        "run": f"{run['tokens']:.3g} tokens: {run['days']:.1f} days, {run['chip_hours']:,.0f}"
        " chip-hours",
        "compiled": f"in {figures['compile_seconds']:.0f} s",
    }
    warnings = []
    if used > memory["capacity"]:
        warnings.append(
            "WARNING: it does not fit: choose a smaller Hardware.per_device_batch, another "
            "Hardware.remat or a mesh that cuts more"
        )
    if figures["unknown_loops"]:
        loops = ", ".join(figures["unknown_loops"])
        warnings.append(f"WARNING: the turns of {loops} are not known, each is counted once")
    sections = [
        section("Where the time goes", picture(_bars(figures), "milliseconds by part")),
        section("Exchanges", _exchanges(figures["collectives"])),
        section("Kernels", _kernels(figures["kernels"])),
        section("How it is reckoned", *map(paragraph, RULES)),
    ]
    return Report(f"A step on {figures['topology']}", facts, warnings, sections)


def _exchanges(rows: list[dict[str, Any]]) -> str:
    return table(
        (
            (
                row["kind"],
                row["dtype"],
                row["network"],
                "alone" if row["synchronous"] else "beside computation",
                f"{row['times']:,}",
                f"{row['bytes'] / 1e6:,.1f}",
                f"{1e3 * row['seconds']:.2f}",
                f"{1e3 * row['exposed']:.2f}",
            )
            for row in rows
        ),
        ("kind", "type", "network", "", "times", "MB received", "link ms", "exposed ms"),
    )


def _kernels(rows: list[dict[str, Any]]) -> str:
    if not rows:
        return paragraph("none")
    cells = ((row["name"], f"{row['times']:,}", f"{row['bytes'] / 1e6:,.1f}") for row in rows)
    return table(cells, ("kernel", "times", "MB read and written, each time"))


def _bars(figures: dict[str, Any]) -> Figure:
    parts = dict(figures["parts"])
    parts |= {name: figures["step"][key] for key, name in _STEP.items() if key != "compute"}
    shown = {name: 1e3 * seconds for name, seconds in parts.items() if seconds >= 5e-5}
    figure = Figure(figsize=(8, 0.3 * len(shown) + 1), layout="constrained")
    axes = figure.subplots()
    axes.barh(list(shown), list(shown.values()))
    axes.invert_yaxis()
    axes.set(xlabel="milliseconds a step")
    axes.grid(axis="x", alpha=0.3)
    return figure
