"""Time and memory of a draw: of 75,000 batches and of 100 million sequences, on one core.

python tests/benchmarks/select_scale.py [--units=75000 100000000]

A round of that many units with losses at random is written and drawn from at a rate of a half, each
size in a process of its own, that is held to one core: select-batches whole, its report included,
and the draw alone. The aims are 1 s and 60 s for the draw, and less than 40 bytes a unit for all.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time

import numpy as np


def measure(units: int) -> None:
    from pangu_tiny.rounds.draw import draw_parts
    from pangu_tiny.rounds.scores import Scores

    os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
    several = units < 10**6
    unit, global_batch = ("batch", 1024) if several else ("sequence", 1000)
    batches = units if several else units // global_batch
    kind, count_kind = ("f8", "i8") if several else ("f4", "i4")
    with tempfile.TemporaryDirectory() as folder:
        _write(folder, unit, batches, global_batch, units, kind, count_kind)
        losses = Scores.open(folder).losses()
        began = time.monotonic()
        draw_parts(losses, units // 2, 1, "loss", 1.0, [0])
        alone = time.monotonic() - began
        del losses
        small = f"{folder}/small"
        _write(small, unit, 10, 100, 10 if several else 1000, kind, count_kind)
        bare, _ = _select(small)
        whole, seconds = _select(folder)
    print(
        f"{units:,} units: draw {alone:.2f} s; select-batches {seconds:.1f} s in all, "
        f"{(whole - bare) / units:.1f} bytes a unit above the {bare / 2**20:.0f} MiB of a process "
        f"that draws from next to nothing",
        flush=True,
    )


def _write(folder, unit, batches, global_batch, units, kind, count_kind):
    from etils import epath

    from pangu_tiny.data.order import Round
    from pangu_tiny.rounds.scores import Scores

    random = np.random.default_rng(0)
    targets = np.full(units, 2048, count_kind)
    nats = (2048 * random.normal(3, 0.3, units)).astype(kind)
    sources = np.ones((units, 1), "i4") if unit == "batch" else np.zeros(units, "i2")
    order = Round("d" * 64, 0, None, True, global_batch, batches)
    path = epath.Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    Scores(order, unit, "m" * 64, "float32", ["text"], nats, targets, sources).write(path)


def _select(folder: str) -> tuple[int, float]:
    """Peak resident bytes and seconds of a process that draws from these scores."""
    code = (
        "from pangu_tiny.rounds.select_batches import select_batches\n"
        f"select_batches({folder!r}, {folder + '/index'!r})\n"
        "print(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])"
    )
    began = time.monotonic()
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return 1024 * int(process.stdout.split()[-1]), time.monotonic() - began


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--units", type=int, nargs="+", default=[75_000, 100_000_000])
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    for units in options.units:
        if options.child:
            measure(units)
        else:
            subprocess.run([sys.executable, __file__, "--child", f"--units={units}"], check=True)
