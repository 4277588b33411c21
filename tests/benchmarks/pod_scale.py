"""Time and memory, on one core, of what a run of 1.6T tokens opens before its first step.

python tests/benchmarks/pod_scale.py

A dataset of 781 million rows in 1,024 shards is made up: its description, and files of the right
size with nothing in them. Opening it, finding the rows of batches all over the run, with a mixture
and without, and reading a round index of 100 million sequences are each measured in a process of
its own that is held to one core. The aims are 5 s and 1 GiB each.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

import numpy as np

ROWS, SHARDS, LENGTH, BATCH = 781_250_000, 1024, 2048, 1024
SOURCES = ("web", "books")
UNITS = 100_000_000


def write_dataset(folder: pathlib.Path) -> None:
    """Shards of the first source, then of the second; no tokenizer is needed to find rows."""
    from pangu_tiny.data.rows import PACKING

    counts = [ROWS // SHARDS + (index < ROWS % SHARDS) for index in range(SHARDS)]
    shards = []
    for index, count in enumerate(counts):
        name, size = f"tokens-train.array_record-{index:05d}-of-{SHARDS:05d}", 2 * LENGTH * count
        with (folder / name).open("wb") as file:
            file.truncate(size)  # takes no room
        source = SOURCES[index >= SHARDS // 2]
        shards.append({"file": name, "source": source, "rows": count, "size": size})
    by_source = {
        name: {"rows": sum(shard["rows"] for shard in shards if shard["source"] == name)}
        for name in SOURCES
    }
    description = {
        "packing": PACKING,
        "digest": "d" * 64,
        "sequence_length": LENGTH,
        "vocab_size": 48_000,
        "begin_id": 1,
        "end_id": 2,
        "tokenizer_digest": "t" * 64,
        "sources": SOURCES,
        "splits": {"train": {"rows": ROWS, "sources": by_source, "shards": shards}},
    }
    (folder / "dataset.json").write_text(json.dumps(description))


def write_index(folder: pathlib.Path) -> None:
    from etils import epath

    from pangu_tiny.data.order import Round
    from pangu_tiny.data.round_index import RoundIndex

    batches = 2 * UNITS // BATCH
    units = np.random.default_rng(0).permutation(UNITS - UNITS % BATCH)
    round_ = Round("d" * 64, 0, None, True, BATCH, batches)
    folder.mkdir()
    RoundIndex(round_, "sequence", "m" * 64, units, {}).write(epath.Path(folder))


def measure(what: str, folder: pathlib.Path) -> None:
    """In a process of its own: imports do not count."""
    from pangu_tiny.data.dataset import TokenDataset
    from pangu_tiny.data.order import Order
    from pangu_tiny.data.round_index import RoundIndex

    os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
    began = time.monotonic()
    if what == "index":
        index = RoundIndex.open(str(folder / "index"))
        found = f"round index of {len(index.units):,} sequences and its digest, "
        found += index.identity["digest"][:12]
    else:
        dataset = TokenDataset.open(folder)
        mixture = {"web": 0.7, "books": 0.3} if what == "mixture" else None
        order, places = Order(0, mixture).rows(dataset, "train"), (0, ROWS // 2, 2 * ROWS)
        rows = {order[place + i] for place in places for i in range(BATCH)}
        found = f"dataset and batches all over its order, {what}: {len(rows):,} rows"
    seconds = time.monotonic() - began
    status = pathlib.Path("/proc/self/status").read_text()
    peak = int(status.split("VmHWM:")[1].split()[0]) / 2**20
    print(f"{found}: {seconds:.2f} s, peak {peak:.2f} GiB", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        measure(options.child[0], pathlib.Path(options.child[1]))
        sys.exit()
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        write_dataset(folder)
        write_index(folder / "index")
        for what in ("no mixture", "mixture", "index"):
            subprocess.run([sys.executable, __file__, "--child", what, name], check=True)
