"""One round against several, by two protocols: held-out loss, and what is forgotten.

python tests/benchmarks/rounds.py --data=DATASET --workdir=FOLDER [--steps=480] [--seeds=3]
    [--rows on_top/one on_top/loss_50 …]

"on_top" takes the paper's way: one corpus, which later rounds go through again. "equal" gives every
row the same number of steps in all, so that a row of two rounds has seen less text. "in_turn" is
"on_top" but for the shuffling of the first round: the model learns one source after the other, and
forgets the first; let --steps go through the dataset once. A seed decides initialisation, order and
draws; differences are paired by it. Every stage keeps its folder below FOLDER: run again, it goes
on where it was interrupted. Prints a table, and leaves rounds.json and rounds.png in FOLDER.
"""

import argparse
import dataclasses
import json
import pathlib
import sys
from typing import Any

import numpy as np
from inheritance import interval, spread


@dataclasses.dataclass(frozen=True)
class Row:
    """Later rounds, each at `rates`, and how they are drawn and trained."""

    rates: tuple[float, ...] = ()
    draw: tuple[tuple[str, Any], ...] = ()
    unit: str = "batch"
    restart: float | None = None


ROWS = {
    "one": Row(),
    "loss_100": Row((1.0,)),
    "loss_50": Row((0.5,)),
    "uniform_50": Row((0.5,), (("method", "uniform"),)),
    "loss_25": Row((0.25,)),
    "three_50": Row((0.5, 0.5)),
    "parts_50": Row((0.5,), (("parts", 8),)),
    "warm_50": Row((0.5,), (("temperature", 10.0),)),
    "cold_50": Row((0.5,), (("temperature", 0.05),)),
    "highest_50": Row((0.5,), (("method", "highest"),)),
    "sequence_50": Row((0.5,), unit="sequence"),
    "sequence_cold_50": Row((0.5,), (("temperature", 0.2),), unit="sequence"),
    "restart_100_50": Row((0.5,), restart=1.0),
    "restart_50_50": Row((0.5,), restart=0.5),
    "restart_25_50": Row((0.5,), restart=0.25),
}
PAPER = ("one", "loss_100", "loss_50", "uniform_50", "loss_25", "three_50")
IN_TURN = (
    "one",
    "loss_100",
    "loss_50",
    "uniform_50",
    "parts_50",
    "warm_50",
    "highest_50",
    "sequence_50",
)
DEFAULT = [
    *(f"on_top/{name}" for name in ROWS),
    *(f"equal/{name}" for name in PAPER),
    *(f"in_turn/{name}" for name in IN_TURN),
]


class Experiment:
    """The stages of one seed, each in a folder that is named by what it follows from."""

    def __init__(self, options: argparse.Namespace, seed: int):
        from pangu_tiny import config
        from pangu_tiny.data.dataset import TokenDataset
        from pangu_tiny.model.shape import ModelShape
        from pangu_tiny.program.optimizer import Optimizer
        from pangu_tiny.topology.hardware import Hardware

        self._hardware = config.build(Hardware, "hardware/cpu.gin")
        self._options, self._seed = options, seed
        self._rows = TokenDataset.open(options.data)
        self._model = ModelShape(
            depth=4,
            width=128,
            heads=2,
            ffn_width=352,
            vocab_size=self._rows.vocab_size,
            tied=True,
            series_terms=2,
            shortcut_ratio=8,
        )
        self._optimizer = Optimizer(
            learning_rate=options.rate, warmup_fraction=0.05, final_fraction=0.05
        )

    def run(self, protocol: str, row: Row) -> dict[str, Any]:
        """One row: bits per byte held out, the first round's losses at the end, by part, steps."""
        from pangu_tiny.program.optimizer import OWN_SCHEDULE, SharedSchedule
        from pangu_tiny.rounds.select_batches import select_batches
        from pangu_tiny.training.metrics import read_metrics

        steps = self._options.steps
        if protocol == "equal":
            steps = round(steps / (1 + sum(row.rates)))
        later = [round(rate * steps) for rate in row.rates]
        total = steps + sum(later)
        shared = row.restart is None
        shuffle = protocol != "in_turn"
        stored = "" if shuffle else "-stored"
        first = self._train(f"round_1-{steps}-{total if shared else steps}{stored}", steps, {
            "shared_schedule": SharedSchedule(0, total if shared else None),
            "shuffle": shuffle,
        })  # fmt: skip
        last, done = first, steps
        optimizer = self._optimizer
        if row.restart:
            optimizer = dataclasses.replace(
                optimizer, learning_rate=row.restart * optimizer.learning_rate
            )
        name = "-".join([row.unit, *(str(part) for pair in row.draw for part in pair)])
        for rate, count in zip(row.rates, later, strict=True):
            scores = self._score(last, first, row.unit)
            index = f"{last}-{name}-{rate}"
            select_batches(str(scores), f"{index}-index", rate, seed=self._seed, **dict(row.draw))
            last = self._train(
                f"{pathlib.Path(index).name}-{row.restart}",
                count,
                {
                    "shared_schedule": SharedSchedule(done, total) if shared else OWN_SCHEDULE,
                    "optimizer": optimizer,
                    "checkpoint": last,
                    "round_index": f"{index}-index",
                    "keep_moments": True,
                    "shuffle": shuffle,
                },
            )
            done += count
        from pangu_tiny.rounds.forgetting import by_part
        from pangu_tiny.rounds.scores import Scores

        held_out = [
            line["held_out_bits_per_byte"]
            for line in read_metrics(last)
            if "held_out_bits_per_byte" in line
        ]
        now = Scores.open(str(self._score(last, first, "batch")))
        return {
            "held_out": held_out[-1],
            "parts": by_part(now, None)["loss now"].tolist(),
            "train_loss": float(now.nats.sum() / now.targets.sum()),
            "steps": [steps, *later],
        }

    def _train(self, name: str, steps: int, changes: dict[str, Any]) -> str:
        from pangu_tiny.training.train import train
        from pangu_tiny.training.watch import Watching

        folder = pathlib.Path(self._options.workdir) / f"seed_{self._seed}" / name
        settings = {"optimizer": self._optimizer, **changes}
        trained = train(
            self._options.data,
            str(folder),
            self._model,
            hardware=self._hardware,
            steps=steps,
            global_batch=8,
            dtype="float32",
            seed=self._seed,
            evaluate_every=10**9,
            save_every=10**9,
            watching=Watching(tensorboard=False),
            **settings,
        )
        if trained.step < steps:
            sys.exit(f"stopped in {folder}; run again to resume")
        return str(folder)

    def _score(self, model: str, first: str, unit: str) -> pathlib.Path:
        from pangu_tiny.rounds.score_batches import score_batches

        folder = pathlib.Path(f"{model}-scores-{unit}")
        score_batches(model, self._options.data, str(folder), self._hardware, unit, round_of=first)
        return folder


def summarise(rows: dict[str, dict[str, Any]], folder: pathlib.Path, bytes_a_step: float) -> None:
    """Prints the table of what is finished, and draws it."""
    from matplotlib.figure import Figure

    protocols = [name for name in ("on_top", "in_turn") if f"{name}/one" in rows]
    figure = Figure(figsize=(5 + 4.5 * len(protocols), 5), layout="constrained")
    bars, *panels = figure.subplots(1, 1 + len(protocols), squeeze=False)[0]
    by_part = dict(zip(protocols, panels, strict=True))
    print(
        f"\n{'row':26} {'steps':>14} {'MB seen':>8} {'held-out bits/byte':>19} "
        f"{'training set, nats':>19}   {'less than one round, paired':28} less than uniform_50"
    )
    for name, seeds in rows.items():
        values = np.array([found["held_out"] for found in seeds.values()])
        losses = np.array([found["train_loss"] for found in seeds.values()])
        steps = next(iter(seeds.values()))["steps"]
        protocol, kind = name.split("/")
        one = f"{protocol}/one" if f"{protocol}/one" in rows else "on_top/one"
        gains = [
            interval(
                [
                    rows[other][seed]["held_out"] - found["held_out"]
                    for seed, found in seeds.items()
                    if seed in rows[other]
                ]
            )
            if other in rows and other != name
            else "-"
            for other in (one, f"{protocol}/uniform_50")
        ]
        seen = steps[0] * bytes_a_step / 1e6
        print(
            f"{name:26} {'+'.join(map(str, steps)):>14} {seen:8.2f} {spread(values):>19} "
            f"{spread(losses):>19}   {gains[0]:28} {gains[1]}"
        )
        bars.errorbar(
            [values.mean()],
            [name],
            xerr=[[values.mean() - values.min()], [values.max() - values.mean()]],
            fmt="o",
            ms=4,
        )
        if protocol in by_part and kind in PAPER + IN_TURN:
            means = np.mean([found["parts"] for found in seeds.values()], axis=0)
            places = np.arange(1, len(means) + 1)
            by_part[protocol].plot(places, means, marker="o", ms=3, label=kind)
    bars.set(xlabel="held-out bits per byte, mean and range")
    bars.invert_yaxis()
    bars.grid(alpha=0.3)
    for protocol, parts in by_part.items():
        parts.set(
            title=protocol, xlabel="part of the first round", ylabel="nats per token at the end"
        )
        parts.grid(alpha=0.3)
        parts.legend()
    figure.savefig(folder / "rounds.png", dpi=110)


def main(options: argparse.Namespace) -> None:
    from pangu_tiny.data.dataset import TokenDataset

    folder = pathlib.Path(options.workdir)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "rounds.json"
    rows = json.loads(file.read_text()) if file.exists() else {}
    train = TokenDataset.open(options.data).description["splits"]["train"]
    bytes_a_step = 8 * train["bytes"] / train["rows"]
    for seed in range(options.seeds):
        experiment = Experiment(options, seed)
        for name in options.rows:
            if str(seed) not in rows.get(name, {}):
                protocol, row = name.split("/")
                found = experiment.run(protocol, ROWS[row])
                rows.setdefault(name, {})[str(seed)] = found
                file.write_text(json.dumps(rows, indent=1))
        summarise(rows, folder, bytes_a_step)


if __name__ == "__main__":
    from pangu_tiny.topology.host import keep_freed_memory

    keep_freed_memory()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("data", "workdir"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--steps", type=int, default=480)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rate", type=float, default=4e-3)
    parser.add_argument("--rows", nargs="+", default=DEFAULT)
    main(parser.parse_args())
