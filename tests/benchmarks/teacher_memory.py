"""A 7B-shaped bfloat16 checkpoint of random weights, cut to PanGu-π-1B Pro, and exported for
transformers: peak memory and time.

python tests/benchmarks/teacher_memory.py --folder=FOLDER [--rounds=3]

FOLDER takes 14 GB for the teacher (made once) and 14 GB for what is made of it. Each measurement is
a process of its own, start included; reading is every leaf of the teacher once, layer by layer. The
aims are 6 GiB at most and 3 times the time of reading for the cut, 3 GiB and twice the time for the
export.
"""

import argparse
import json
import pathlib
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator

import numpy as np

STUDENT = "models/pangu_pi_1b_pro.gin"


def make(folder: pathlib.Path) -> None:
    """The teacher, scores for it, and a map of the vocabulary."""
    import ml_dtypes
    from etils import epath

    from pangu_tiny import config
    from pangu_tiny.checkpoints.read import open_checkpoint
    from pangu_tiny.checkpoints.write import Part, parts_of, write_parts
    from pangu_tiny.inherit.importance import Importance
    from pangu_tiny.inherit.structures import OUTSIDE, sizes
    from pangu_tiny.model.decoder import parameter_shapes
    from pangu_tiny.model.shape import ModelShape
    from pangu_tiny.tokenizer.model import train_tokenizer

    shape = config.build(ModelShape, "models/pangu_pi_7b.gin")
    shapes = parameter_shapes(shape)
    random = np.random.default_rng(0)
    noise = random.standard_normal(2**24, np.float32).astype(ml_dtypes.bfloat16)

    def parts() -> Iterator[Part]:
        for name, layer in parts_of(shape):
            leaf = shapes
            for key in name.split("/"):
                leaf = leaf[key]
            size = leaf.shape if layer is None else leaf.shape[1:]
            yield Part(name, layer, np.resize(noise, size))

    text = ["a cat sat on a mat " * 50, "the quick brown fox jumps over the lazy dog " * 50]
    compact = train_tokenizer(text, 290)
    write_parts(
        epath.Path(folder / "teacher" / "checkpoints"),
        shape,
        "bfloat16",
        parts(),
        compact.model_bytes,
        label="teacher",
        identity={"tokenizer": "big"},
        begin_id=1,
        end_id=2,
        sequence_length=2048,
    )
    teacher = open_checkpoint(str(folder / "teacher"))
    arrays = {
        kind: random.random((shape.depth, size)) for kind, size in sizes(shape).items() if size
    }
    arrays |= {OUTSIDE: random.random(shape.width), "skip_1": random.random(shape.depth)}
    layers = list(range(shape.depth))
    facts = {"teacher": teacher.digest, "layers": layers, "method": "taylor", "model": None}
    facts |= {"repeat_kv": False, "merge_kv": False, "output_grams": False}
    (folder / "importance").mkdir(exist_ok=True)
    Importance(facts, arrays).write(epath.Path(folder / "importance"))
    (folder / "tokenizer").mkdir(exist_ok=True)
    (folder / "tokenizer" / "tokenizer.model").write_bytes(compact.model_bytes)
    kept = np.sort(random.permutation(shape.vocab_size)[:48_000]).tolist()
    id_map = {"method": "flow", "exact": False, "old_digest": "big", "new_digest": compact.digest}
    id_map |= {"old_to_new": [], "new_to_old": kept}
    (folder / "tokenizer" / "id_map.json").write_text(json.dumps(id_map))


def read(folder: pathlib.Path) -> None:
    from pangu_tiny.checkpoints.read import open_checkpoint
    from pangu_tiny.checkpoints.write import parts_of

    teacher = open_checkpoint(str(folder / "teacher"))
    for name, layer in parts_of(teacher.shape):
        teacher.leaf(name).read(layer)


def cut(folder: pathlib.Path) -> None:
    from pangu_tiny.cli import main

    bindings = {
        "teacher": folder / "teacher",
        "importance": folder / "importance",
        "tokenizer": folder / "tokenizer",
        "workdir": folder / "student",
    }
    flags = [f"--gin.inherit.{name}={path}" for name, path in bindings.items()]
    if main(["inherit", f"--gin_file={STUDENT}", *flags]):
        sys.exit("inherit failed")


def export(folder: pathlib.Path) -> None:
    from pangu_tiny.cli import main

    bindings = {"checkpoint": folder / "teacher", "workdir": folder / "export"}
    if main(["export-hf", *(f"--gin.export_hf.{name}={path}" for name, path in bindings.items())]):
        sys.exit("export-hf failed")


RUNS = {"read": read, "cut": cut, "export": export}


def measure(folder: pathlib.Path, what: str) -> tuple[float, float]:
    """Seconds and the peak resident GiB of a process of its own."""
    script = (
        "import resource, subprocess, sys; "
        "code = subprocess.call(sys.argv[1:], stdout=2); "
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20); "
        "sys.exit(code)"
    )
    command = [sys.executable, __file__, f"--folder={folder}", f"--run={what}"]
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", script, *command], check=True, stdout=subprocess.PIPE, text=True
    )
    return time.perf_counter() - start, float(done.stdout)


def compare(folder: pathlib.Path, rounds: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "tokenizer" / "id_map.json").exists():
        make(folder)
    seconds: dict[str, list[float]] = {what: [] for what in RUNS}
    peaks = dict.fromkeys(RUNS, 0.0)
    for _ in range(rounds):
        for what in RUNS:
            for made in ("student", "export"):
                shutil.rmtree(folder / made, ignore_errors=True)
            taken, peak = measure(folder, what)
            seconds[what].append(taken)
            peaks[what] = max(peaks[what], peak)
    for what, times in seconds.items():
        print(
            f"{what:6} {statistics.median(times):6.1f} s, median of {rounds}, {min(times):.1f} to "
            f"{max(times):.1f}; peak {peaks[what]:.2f} GiB"
        )
    for what in ("cut", "export"):
        ratio = statistics.median(seconds[what]) / statistics.median(seconds["read"])
        print(f"{what} / read {ratio:.2f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=pathlib.Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--run", choices=RUNS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        RUNS[options.run](options.folder.absolute())
    else:
        compare(options.folder.absolute(), options.rounds)
