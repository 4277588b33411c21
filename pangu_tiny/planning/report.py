"""A plan as a few lines, and as a page."""

from typing import Any

from matplotlib.figure import Figure

from pangu_tiny.page import Report, paragraph, picture, section, table
from pangu_tiny.planning.estimate import RULES

GIB = 2**30
_ENOUGH_FREE = 0.1
_TITLES = {
    "train": "A step of train",
    "score": "A step of score-batches",
    "rank": "A batch of rank-teacher",
    "decode": "A token of generate",
}
_PARTED = ("products", "passes")  # by part of the model
STEP = {
    "products": "products",
    "passes": "passes over memory",
    "kernels": "attention kernel",
    "exposed_ici": "exposed exchanges, ICI",
    "exposed_dcn": "exposed exchanges, DCN",
    "waits": "waits for copies to fast memory",
    "at_least": "what has no estimate, at least",
}


def report_of(figures: dict[str, Any]) -> Report:
    title = f"{_TITLES[figures['program']]} on {figures['topology']}"
    tried = section("What was tried", _tried(figures["tried"]))
    if "step" not in figures:
        facts = {"memory": f"{_needs(figures)} a chip"}
        return Report(title, facts, _warnings(figures), [tried])
    memory, step, run = figures["memory"], figures["step"], figures["run"]
    mesh = " × ".join(f"{axis} {size}" for axis, size in figures["mesh"].items())
    mesh += f", accumulated {figures['accumulation']} times"
    bound = "at least " if step["at_least"] else ""
    facts = {
        "mesh": mesh,
        "memory": f"{used(memory) / GIB:.2f} of {memory['capacity'] / GIB:.0f} GiB a chip: "
        + ", ".join(f"{k} {v / GIB:.2f}" for k, v in memory.items() if v and k != "capacity"),
        "step": f"{bound}{1e3 * step['total']:.1f} ms: "
        + ", ".join(f"{STEP[k]} {1e3 * v:.1f}" for k, v in step.items() if k in STEP),
        "speed": f"at most {run['tokens_per_second']:,.0f} tokens/s, MFU {run['mfu']:.1%}",
    }
    if "tokens" in run:
        days = run["days"]
        time = f"{days:.1f} days" if days >= 1 else f"{24 * days:.1f} hours"
        cost = f"{time}, {run['chip_hours']:,.0f} chip-hours"
        facts["run"] = f"{run['tokens']:.3g} tokens: {cost}"
    facts["compiled"] = f"in {figures['compile_seconds']:.0f} s"
    sections = [
        section("Where the time goes", picture(_bars(figures), "milliseconds by part")),
        section("Exchanges", _exchanges(figures["collectives"])),
        section("Kernels", _kernels(figures["kernels"])),
        section("How it is reckoned", *map(paragraph, RULES)),
    ]
    sections += [tried] if len(figures["tried"]) > 1 else []
    return Report(title, facts, _warnings(figures), sections)


def _warnings(figures: dict[str, Any]) -> list[str]:
    asked, *others = figures["tried"]
    warnings = []
    if not asked["fits"]:
        warnings.append(f"WARNING: it does not fit: {_instead(figures, others)}")
    if "step" not in figures:
        return warnings
    memory = figures["memory"]
    free = 1 - used(memory) / memory["capacity"]
    if free < _ENOUGH_FREE:
        warnings.append(
            f"WARNING: {free:.1%} of the HBM is free, less than the {_ENOUGH_FREE:.0%} that leave "
            "room for what the compiler does not know of"
        )
    warnings += [f"WARNING: {line}" for line in figures["thin_shards"]]
    if figures["unknown_loops"]:
        loops = ", ".join(figures["unknown_loops"])
        warnings.append(f"WARNING: the turns of {loops} are not known, each is counted once")
    return warnings


def _needs(figures: dict[str, Any]) -> str:
    """Of what was asked for."""
    need = figures["tried"][0]["need"]
    return f"{need / GIB:.1f} of {figures['capacity'] / GIB:.0f} GiB"


def _instead(figures: dict[str, Any], others: list[dict[str, Any]]) -> str:
    needs = _needs(figures)
    if "step" in figures:
        (fits,) = (tried for tried in others if tried["fits"])
        takes = f"{fits['need'] / GIB:.1f} GiB, {1e3 * figures['step']['total']:.0f} ms"
        return f"{needs}; with {in_words(fits['changes'])} it does: {takes}, which all else is of"
    if not others:
        return f"{needs}, and nothing else is left to try"
    least = min(others, key=lambda tried: tried["need"])
    return (
        f"{needs}, nor does any of {len(others)} others; the least, {in_words(least['changes'])}, "
        f"{'needs' if least['seconds'] is not None else 'would need'} {least['need'] / GIB:.1f}: "
        "more chips, or a smaller model"
    )


def in_words(changes: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in changes.items()) or "as it is bound"


def used(memory: dict[str, int]) -> int:
    return sum(size for name, size in memory.items() if name != "capacity")


def _tried(rows: list[dict[str, Any]]) -> str:
    cells = []
    for row in rows:
        took = row["seconds"]
        verdict = "left out: not expected to fit" if took is None else ""
        verdict = verdict or ("fits" if row["fits"] else "does not fit")
        size = f"{row['need'] / GIB:.1f}"
        cells.append((in_words(row["changes"]), size, verdict, "" if took is None else took))
    return table(cells, ("program", "GiB of HBM a chip", "", "seconds to compile"))


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
    parts |= {name: figures["step"][key] for key, name in STEP.items() if key not in _PARTED}
    shown = {name: 1e3 * seconds for name, seconds in parts.items() if seconds >= 5e-5}
    figure = Figure(figsize=(8, 0.3 * len(shown) + 1), layout="constrained")
    axes = figure.subplots()
    axes.barh(list(shown), list(shown.values()))
    axes.invert_yaxis()
    axes.set(xlabel="milliseconds a step")
    axes.grid(axis="x", alpha=0.3)
    return figure
