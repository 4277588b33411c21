"""count-tokens against SentencePiece's own batch encoding, with as many threads, taking turns.

python tests/benchmarks/count_speed.py --data=FOLDER [--copies=8] [--rounds=3]

FOLDER holds `tokenizers/*.model` and `corpora/*.jsonl` (key `text`), which are read `copies` times.
SentencePiece has all texts in memory before its clock starts; count-tokens reads its files, starts
its processes, takes digests and writes its result within its time. The aim is a ratio of 0.9.
"""

import argparse
import json
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

import sentencepiece


def main(data: pathlib.Path, copies: int, rounds: int) -> None:
    corpora = sorted((data / "corpora").glob("*.jsonl"))
    model = max((data / "tokenizers").glob("*.model"), key=lambda file: file.stat().st_size)
    texts = [
        json.loads(line)["text"]
        for file in corpora
        for line in file.read_text(encoding="utf-8").splitlines()
    ] * copies
    size = sum(len(text.encode()) for text in texts)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    threads = len(os.sched_getaffinity(0))
    seconds: dict[str, list[float]] = {"SentencePiece": [], "count-tokens": []}
    with tempfile.TemporaryDirectory() as folder:
        for copy in range(copies):
            for file in corpora:
                shutil.copy(file, f"{folder}/{copy}-{file.name}")
        command = [
            sys.executable, "-m", "pangu_tiny", "count-tokens",
            f"--gin.count_tokens.text={folder}", f"--gin.count_tokens.tokenizer={model}",
            "--gin.count_tokens.held_out_fraction=0.0",
        ]  # fmt: skip
        for attempt in range(rounds):
            start = time.perf_counter()
            processor.encode_as_numpy(texts, num_threads=threads)
            seconds["SentencePiece"].append(time.perf_counter() - start)
            start = time.perf_counter()
            subprocess.run(
                [*command, f"--gin.count_tokens.workdir={folder}/{attempt}"],
                check=True,
                capture_output=True,
            )
            seconds["count-tokens"].append(time.perf_counter() - start)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    for name, times in seconds.items():
        print(
            f"{name:14} {size / medians[name] / 1e6:6.2f} MB/s, median of {rounds},"
            f" {size / max(times) / 1e6:.2f} to {size / min(times) / 1e6:.2f}"
        )
    print(f"ratio {medians['SentencePiece'] / medians['count-tokens']:.3f} on {size / 1e6:.0f} MB")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=pathlib.Path, required=True)
    parser.add_argument("--copies", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    main(options.data, options.copies, options.rounds)
