"""prepare-data on Beam's local runner against the local way, each on one core, taking turns.

python tests/benchmarks/beam_speed.py --data=FOLDER [--copies=3] [--rounds=3]

FOLDER holds `tokenizers/*.model` and `corpora/*.jsonl` (key `text`), which are read `copies` times.
Starting either is within its time. The aim is a ratio of 0.8, and the digest has to be the same.
"""

import argparse
import json
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

FLAGS = {
    "local": ["--gin.prepare_data.processes=1"],
    "Beam": ["--gin.prepare_data.runner=DirectRunner"],
}
ON_ONE_CORE = "import os, sys; os.sched_setaffinity(0, [0]); os.execv(sys.executable, sys.argv[1:])"


def main(data: pathlib.Path, copies: int, rounds: int) -> None:
    corpora = sorted((data / "corpora").glob("*.jsonl"))
    model = max((data / "tokenizers").glob("*.model"), key=lambda file: file.stat().st_size)
    size = copies * sum(file.stat().st_size for file in corpora)
    seconds: dict[str, list[float]] = {way: [] for way in FLAGS}
    digests = set()
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        (folder / "text").mkdir()
        for copy in range(copies):
            for file in corpora:
                shutil.copy(file, folder / "text" / f"{copy}-{file.name}")
        for number in range(1, rounds + 1):
            for way, flags in FLAGS.items():
                rows = folder / f"{way}-{number}"
                argv = [sys.executable, "-m", "pangu_tiny", "prepare-data", *flags]
                argv += [f"--gin.prepare_data.text={folder / 'text'}"]
                argv += [f"--gin.prepare_data.tokenizer={model}"]
                argv += ["--gin.prepare_data.sequence_length=2048"]
                argv += [f"--gin.prepare_data.workdir={rows}"]
                start = time.perf_counter()
                subprocess.run(
                    [sys.executable, "-c", ON_ONE_CORE, *argv], check=True, capture_output=True
                )
                seconds[way].append(time.perf_counter() - start)
                digests.add(json.loads((rows / "dataset.json").read_text())["digest"])
                shutil.rmtree(rows)
                print(f"round {number}: {way} {seconds[way][-1]:.1f} s", file=sys.stderr)
    for way, times in seconds.items():
        print(
            f"{way:6} {size / statistics.median(times) / 1e6:6.2f} MB/s a core, median of {rounds},"
            f" {size / max(times) / 1e6:.2f} to {size / min(times) / 1e6:.2f}"
        )
    ratio = statistics.median(seconds["local"]) / statistics.median(seconds["Beam"])
    print(f"ratio {ratio:.3f} on {size / 1e6:.0f} MB, digests {digests}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=pathlib.Path, required=True)
    parser.add_argument("--copies", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    main(options.data, options.copies, options.rounds)
