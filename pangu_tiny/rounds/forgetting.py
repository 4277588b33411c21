"""What a model has forgotten: the loss of a round when it was trained, and now.

Axes: i batch, p part.
"""

import numpy as np
from etils import epath
from matplotlib.figure import Figure

from pangu_tiny.page import Report, paragraph, picture, section, table
from pangu_tiny.rounds.draw import PARTS, bounds
from pangu_tiny.rounds.scores import Scores
from pangu_tiny.training.metrics import read_records, row_loss_files

EXPLAINED = (
    "The batches of the first round in parts, in the order in which they were trained: their loss"
    " just before they were trained on, and their loss under the model at the end. Where the loss"
    " of the early parts stays above that of the late ones, they were forgotten."
)


def seen_losses(workdir: epath.Path, batches: int) -> np.ndarray | None:
    """Losses of the first batches of a run as it trained them: float64 [batches, 2], nats and
    targets; None where the run has not left them all."""
    found_i2 = np.zeros((batches, 2))
    for path in row_loss_files(workdir).values():
        records = read_records(path)
        records = records[records["step"] < batches]
        np.add.at(found_i2[:, 0], records["step"], records["nats"])
        np.add.at(found_i2[:, 1], records["step"], records["targets"])
    return found_i2 if found_i2[:, 1].all() else None


def by_part(scores: Scores, seen_i2: np.ndarray | None) -> dict[str, np.ndarray]:
    """Mean nats per target [p] of each part: now and, given `seen_i2`, when trained."""
    parts = min(PARTS, scores.round.batches)
    now_i2 = np.stack(
        [
            array.reshape(scores.round.batches, -1).sum(axis=1, dtype=np.float64)
            for array in (scores.nats, scores.targets)
        ],
        axis=1,
    )
    found = {"loss now": _means(now_i2, parts)}
    if seen_i2 is None:
        return found
    return {"loss when seen": _means(seen_i2, parts), **found}


def forgetting_section(lines: dict[str, np.ndarray]) -> str:
    """What `by_part` found, in HTML, as a picture and a table."""
    numbers = np.arange(1, 1 + len(next(iter(lines.values()))))
    figure = Figure(figsize=(6.5, 3.6), layout="constrained")
    axes = figure.subplots()
    for name, means_p in lines.items():
        axes.plot(numbers, means_p, marker="o", ms=4, label=name)
    axes.set(xlabel="part of the round, in the order of training", ylabel="nats per token")
    axes.set_xticks(numbers)
    axes.grid(alpha=0.3)
    axes.legend()
    rows = [
        [number, *(f"{means_p[number - 1]:.4f}" for means_p in lines.values())]
        for number in numbers
    ]
    return section(
        "Forgetting",
        paragraph(EXPLAINED),
        picture(figure, "loss by part of the round"),
        table(rows, ["part", *lines]),
    )


def report_of(lines: dict[str, np.ndarray]) -> Report:
    facts = {name: " ".join(f"{mean:.4f}" for mean in means_p) for name, means_p in lines.items()}
    return Report("What the model has forgotten", facts, sections=[forgetting_section(lines)])


def _means(sums_i2: np.ndarray, parts: int) -> np.ndarray:
    """Nats per target of each part of some batches."""
    totals_p2 = [sums_i2[start:end].sum(axis=0) for start, end in bounds(len(sums_i2), parts)]
    return np.array([nats / max(1, targets) for nats, targets in totals_p2])
