"""Students of one shape, cut out of one teacher by every criterion, trained on equally many tokens.

python tests/benchmarks/inheritance.py --teacher=CHECKPOINT --data=DATASET --workdir=FOLDER
    [--steps=300] [--seeds=3] [--depth=6 --width=128 --heads=2 --ffn_width=352]

DATASET is prepared with the teacher's tokenizer, which the students keep. A seed decides the
calibration batches, the noise of learned masks, the order of training and random initialisation;
the layers are the same for all. Every stage keeps its folder below FOLDER: run again, it goes on
where it was interrupted. Prints held-out bits per byte right after the cut and along the training,
with paired differences, and leaves inheritance.json and inheritance.png in FOLDER.
"""

import argparse
import dataclasses
import json
import math
import pathlib

import numpy as np

METHODS = ("none", "l1", "l2", "taylor", "activation", "learned")


def run(options: argparse.Namespace, method: str, seed: int) -> dict[str, float]:
    """One student: held-out bits per byte by the number of steps, and right after the cut with
    "calibrated" norms."""
    from pangu_tiny import config
    from pangu_tiny.checkpoints.read import open_checkpoint
    from pangu_tiny.evaluation.evaluate import evaluate
    from pangu_tiny.inherit.inherit import inherit
    from pangu_tiny.inherit.layers import LayerChoice
    from pangu_tiny.inherit.masks import MaskTraining
    from pangu_tiny.inherit.rank_teacher import rank_teacher
    from pangu_tiny.program.optimizer import Optimizer
    from pangu_tiny.topology.hardware import Hardware
    from pangu_tiny.training.metrics import read_metrics
    from pangu_tiny.training.train import train
    from pangu_tiny.training.watch import Watching

    hardware = config.build(Hardware, "hardware/cpu.gin")
    folder = pathlib.Path(options.workdir) / f"{method}-{seed}"
    teacher = open_checkpoint(options.teacher).shape
    model = dataclasses.replace(
        teacher,
        depth=options.depth,
        width=options.width,
        heads=options.heads,
        kv_heads=options.heads,
        ffn_width=options.ffn_width,
    )
    found: dict[str, float] = {}
    start = None
    if method != "none":
        settings = {"calibration_batches": options.batches, "model": model}
        masks = MaskTraining(steps=options.mask_steps)
        ranked = rank_teacher(
            options.teacher,
            str(pathlib.Path(options.workdir) / "layers"),
            hardware,
            LayerChoice(),
            masks,
            options.data,
            method="l1",
            **settings,
        )
        choice = LayerChoice(rule="listed", layers=ranked.about["layers"])
        rank_teacher(
            options.teacher,
            str(folder / "importance"),
            hardware,
            choice,
            masks,
            options.data,
            method=method,
            seed=seed,
            **settings,
        )
        start = str(folder / "cut")
        importance = str(folder / "importance")
        inherit(options.teacher, start, choice, model, importance=importance)
        evaluated = evaluate(start, options.data, str(folder / "evaluation"), hardware)
        found["0"] = evaluated["bits_per_byte"]
        other = str(folder / "calibrated")
        inherit(options.teacher, other, choice, model, importance=importance, calibrate_norms=True)
        evaluated = evaluate(other, options.data, f"{other}-evaluation", hardware)
        found["calibrated"] = evaluated["bits_per_byte"]
    train(
        options.data,
        str(folder / "model"),
        model,
        Optimizer(learning_rate=options.rate, warmup_fraction=0.05, final_fraction=0.05),
        hardware,
        options.steps,
        global_batch=16,
        checkpoint=start,
        dtype="float32",
        seed=seed,
        evaluate_every=max(1, options.steps // 3),
        watching=Watching(tensorboard=False),
    )
    for line in read_metrics(str(folder / "model")):
        if "held_out_bits_per_byte" in line:
            found[str(line["step"] + 1)] = line["held_out_bits_per_byte"]
    return found


def summarise(rows: dict[str, dict[str, dict[str, float]]], folder: pathlib.Path) -> None:
    """Prints the table of what is finished, and draws it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    print(
        f"\n{'method':12} {'after the cut':>16} {'norms calibrated':>16} {'at the end':>16}"
        "   less than none, paired"
    )
    last = str(max(int(step) for step in rows["none"]["0"]))
    ends = {
        method: {seed: found[last] for seed, found in seeds.items()}
        for method, seeds in rows.items()
    }
    for method, seeds in rows.items():
        steps = sorted(int(step) for step in next(iter(seeds.values())) if step.isdigit())
        values = np.array([[found[str(step)] for step in steps] for found in seeds.values()])
        axes.plot(steps, values.mean(0), marker="o", ms=3, label=method)
        axes.fill_between(steps, values.min(0), values.max(0), alpha=0.15)
        cut = spread(values[:, 0]) if steps[0] == 0 else "-"
        after = [found["calibrated"] for found in seeds.values() if "calibrated" in found]
        calibrated = spread(np.array(after)) if after else "-"
        pairs = [ends["none"][seed] - end for seed, end in ends[method].items()]
        gain = interval(pairs) if method != "none" else "-"
        print(f"{method:12} {cut:>16} {calibrated:>16} {spread(values[:, -1]):>16}   {gain}")
    axes.set(xlabel="step", ylabel="held-out bits per byte", title="inheritance by criterion")
    axes.set_ylim(top=min(axes.get_ylim()[1], 6))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(folder / "inheritance.png", dpi=110)


def spread(values: np.ndarray) -> str:
    """Mean and half of the range."""
    return f"{values.mean():.4f} ± {np.ptp(values) / 2:.4f}"


def interval(pairs: list[float]) -> str:
    """Mean and 95 % interval of paired differences (Student's t)."""
    quantiles = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365}
    mean = float(np.mean(pairs))
    if len(pairs) not in quantiles:
        return f"{mean:.4f}"
    half = quantiles[len(pairs)] * float(np.std(pairs, ddof=1)) / math.sqrt(len(pairs))
    return f"{mean:.4f} [{mean - half:.4f}, {mean + half:.4f}]"


def main(options: argparse.Namespace) -> None:
    folder = pathlib.Path(options.workdir)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "inheritance.json"
    rows = json.loads(file.read_text()) if file.exists() else {}
    for seed in range(options.seeds):
        for method in options.methods:
            if str(seed) not in rows.get(method, {}):
                found = run(options, method, seed)
                rows.setdefault(method, {})[str(seed)] = found
                file.write_text(json.dumps(rows, indent=1))
        summarise(rows, folder)


if __name__ == "__main__":
    from pangu_tiny.topology.host import keep_freed_memory

    keep_freed_memory()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("teacher", "data", "workdir"):
        parser.add_argument(f"--{name}", required=True)
    for name, value in (("depth", 6), ("width", 128), ("heads", 2), ("ffn_width", 352)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--mask_steps", type=int, default=300)
    parser.add_argument("--batches", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    main(parser.parse_args())
