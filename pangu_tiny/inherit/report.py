"""The report of rank-teacher: which layers matter, and how unevenly the rest does."""

import numpy as np
from matplotlib.figure import Figure

from pangu_tiny.inherit.importance import Importance
from pangu_tiny.inherit.layers import WINDOWS
from pangu_tiny.page import Report, paragraph, picture, section

_NAMES = {
    "embed": "residual channels",
    "kv_heads": "key-value heads",
    "heads": "query heads",
    "ffn": "neurons",
    "bottleneck": "channels of the shortcut",
}


def report_of(ranking: Importance) -> Report:
    about, arrays = ranking.about, ranking.arrays
    facts = {
        "teacher": ", ".join(f"{name} {value}" for name, value in about["teacher_shape"].items()),
        "method": about["method"],
        "ranked on layers": ", ".join(map(str, about["layers"])),
        "calibration": f"{about['calibration_batches']} batches of {about['batch_size']} sequences"
        if about["dataset"]
        else "none",
    }
    sections = []
    if "influence" in arrays:
        sections.append(
            section(
                "Layers",
                paragraph(
                    "Rise of the held-out loss when one, two or three adjacent layers are skipped,"
                    " by the first of them; and one less the cosine between what comes into a layer"
                    " and what goes out. Layers that are low in all curves can go."
                ),
                picture(_layers(ranking), "importance of layers"),
            )
        )
    kinds = {kind: name for kind, name in _NAMES.items() if kind in arrays}
    sections.append(
        section(
            "Inside the layers",
            paragraph(
                f"How importance by {about['method']} is spread, each layer's scores divided by"
                " their mean size. The longer the tail, the more a choice by it is worth."
            ),
            picture(_histograms(ranking, kinds), "histograms of importance"),
        )
    )
    return Report("What matters in the teacher", facts, sections=sections)


def _layers(ranking: Importance) -> Figure:
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    skipped, influence = figure.subplots(1, 2)
    for window in WINDOWS:
        if (rises := ranking.arrays.get(f"skip_{window}")) is not None:
            label = "1 layer" if window == 1 else f"{window} layers"
            skipped.plot(rises, marker="o", ms=3, label=label)
    if skipped.lines:
        skipped.legend()
    # The first layer matters more than all others together; a rise may be negative.
    skipped.set_yscale("symlog", linthresh=0.1)
    influence.set_yscale("log")
    skipped.set(title="skipped", xlabel="first layer", ylabel="rise of the loss, nats per token")
    influence.plot(ranking.arrays["influence"], marker="o", ms=3)
    influence.set(title="block influence", xlabel="layer", ylabel="1 − cosine")
    for axes in (skipped, influence):
        for layer in ranking.about["layers"]:
            axes.axvline(layer, color="gray", lw=0.4, alpha=0.4)
        axes.grid(alpha=0.3)
    return figure


def _histograms(ranking: Importance, kinds: dict[str, str]) -> Figure:
    figure = Figure(figsize=(9, 2.6 * -(-len(kinds) // 3)), layout="constrained")
    places = figure.subplots(-(-len(kinds) // 3), 3, squeeze=False).reshape(-1)
    structures = ranking.structures(ranking.about["layers"])
    for axes, (kind, name) in zip(places, kinds.items(), strict=False):
        scores = np.atleast_2d(structures[kind])
        size = np.mean(np.abs(scores), axis=-1, keepdims=True)
        axes.hist((scores / np.where(size, size, 1)).reshape(-1), bins=40, log=True)
        axes.set(title=name)
        axes.grid(alpha=0.3)
    for axes in places[len(kinds) :]:
        axes.remove()
    return figure
