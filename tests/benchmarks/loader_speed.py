"""Tokens a second of the loader on one core, at sequence 2048.

    python tests/benchmarks/loader_speed.py [--rows 8192] [--batch 256] [--repeats 7]

Writes random rows to a temporary folder through the same writer as prepare-data, pins itself to
one core and times the loader, reading at random from the page cache.
"""

import argparse
import os
import statistics
import tempfile
import time

import numpy as np

from pangu_tiny.data.dataset import TokenDataset
from pangu_tiny.data.loader import batches
from pangu_tiny.data.order import Order
from pangu_tiny.data.prepare_data import prepare_data


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--sequence_length", type=int, default=2048)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        letters = np.random.default_rng(0).integers(97, 123, (arguments.rows, 3000), np.uint8)
        for index, part in enumerate(np.array_split(letters, 8)):
            with open(os.path.join(folder, f"{index}.jsonl"), "wb") as file:
                file.writelines(b'{"text": "%s"}\n' % row.tobytes() for row in part)
        dataset_folder = os.path.join(folder, "dataset")
        prepare_data(f"{folder}/*.jsonl", dataset_folder, arguments.sequence_length, vocab_size=512)
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        measure(TokenDataset.open(dataset_folder), arguments.batch, arguments.repeats)


def measure(dataset: TokenDataset, batch: int, repeats: int) -> None:
    steps = max(1, dataset.count("train") // batch)
    iterator = batches(dataset, "train", batch, Order(0))
    next(iterator)
    rates = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(steps):
            next(iterator)
        tokens = steps * batch * dataset.sequence_length
        rates.append(tokens / (time.perf_counter() - start) / 1e6)
    print(
        f"{statistics.median(rates):.1f}M tokens/s on one core"
        f" ({min(rates):.1f} to {max(rates):.1f} over {repeats} repeats,"
        f" {steps} batches of {batch} rows of {dataset.sequence_length})"
    )


if __name__ == "__main__":
    main()
