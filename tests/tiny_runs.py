"""Training runs for tests: real ones, of a model and a dataset that are tiny."""

import contextlib
import dataclasses
import json
import os
import pathlib
import random
import socket
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from pangu_tiny.data.dataset import TokenDataset
from pangu_tiny.data.prepare_data import prepare_data
from pangu_tiny.model.shape import ModelShape
from pangu_tiny.program.optimizer import Optimizer
from pangu_tiny.topology.hardware import Hardware
from pangu_tiny.training.train import Trained, train
from pangu_tiny.training.watch import Watching

SHAPE = ModelShape(
    depth=2,
    width=32,
    heads=4,
    kv_heads=2,
    ffn_width=48,
    vocab_size=300,
    series_terms=2,
    shortcut_ratio=8,
)
EIGHT = Hardware(data=1, fsdp=4, tensor=2)
"""The eight virtual devices of `conftest.py`."""

_SYLLABLES = ["the", "cat", "sat", "on", "größ", "er", "世界", "ran", "a", "way", "als", "12"]


def prepare(folder: pathlib.Path, **changes: Any) -> str:
    """A dataset of 300 short documents, so that rows differ in how many targets they have."""
    random = np.random.default_rng(0)
    words = ["".join(random.choice(_SYLLABLES, random.integers(1, 4))) for _ in range(80)]
    texts = [" ".join(random.choice(words, random.integers(1, 20))) for _ in range(300)]
    folder.mkdir(parents=True, exist_ok=True)
    lines = "\n".join(json.dumps({"text": text}) for text in texts)
    (folder / "text.jsonl").write_text(lines)
    settings = {"sequence_length": 32, "vocab_size": 300, "held_out_fraction": 0.1} | changes
    prepare_data(str(folder / "text.jsonl"), str(folder / "data"), processes=1, **settings)
    return str(folder / "data")


SETTINGS: dict[str, Any] = {
    "steps": 20,
    "global_batch": 8,
    "dtype": "float32",
    "log_every": 1,
    "save_every": 5,
    "keep_every": 5,
    "evaluate_every": 10,
    "tensorboard": False,
}
RATE = 3e-3


def run(dataset: str, workdir: Any, **changes: Any) -> Trained:
    """`train` on the eight devices of this process."""
    settings = {
        "model": SHAPE,
        "optimizer": Optimizer(learning_rate=RATE),
        "hardware": EIGHT,
        **SETTINGS,
        **changes,
    }
    watching = Watching(**{name: settings.pop(name) for name in _WATCHING if name in settings})
    return train(dataset, str(workdir), watching=watching, **settings)


_WATCHING = [field.name for field in dataclasses.fields(Watching)]


def command(dataset: str, workdir: Any, hardware: Hardware, **changes: Any) -> list[str]:
    """The same run as a command."""
    bindings = {
        f"{'Watching' if name in _WATCHING else 'train'}.{name}": value
        for name, value in (SETTINGS | changes).items()
    }
    bindings |= {f"ModelShape.{name}": value for name, value in vars(SHAPE).items()}
    bindings |= {f"Hardware.{name}": value for name, value in vars(hardware).items()}
    bindings |= {"train.dataset": dataset, "train.workdir": workdir}
    bindings |= {"Optimizer.learning_rate": RATE}
    flags = [f"--gin.{name}={value}" for name, value in bindings.items()]
    return [sys.executable, "-m", "pangu_tiny", "train", *flags]


def start(argv: list[str], devices: int, log: pathlib.Path, cwd: Any = None) -> subprocess.Popen:
    """Starts a process with so many virtual devices, its output in `log`; compiled programs are
    shared with this process."""
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", f"device_count={devices}")
    cache = jax.config.jax_compilation_cache_dir
    environment = {
        **os.environ,
        "XLA_FLAGS": flags,
        **({"JAX_COMPILATION_CACHE_DIR": cache} if cache else {}),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    with log.open("wb") as file:
        return subprocess.Popen(
            argv, stdout=file, stderr=subprocess.STDOUT, env=environment, cwd=cwd
        )


def kill_each(
    argv: list[str],
    devices: int,
    log: pathlib.Path,
    due: list[int],
    reached: Callable[[], int],
    most: float,
) -> None:
    """Runs a command that is killed as often as `due` is long, each time up to `most` seconds after
    `reached` comes to the next of it, and then to its end."""
    for place in sorted(due):
        process = start(argv, devices, log)
        while reached() < place and process.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=0.02)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=random.uniform(0, most))
            assert process.returncode == 0, log.read_text()[-3000:]
        process.kill()
        process.wait()
        print(f"killed at {reached()}, {place} was due", flush=True)
    assert start(argv, devices, log).wait() == 0, log.read_text()[-3000:]


def start_together(argv: list[str], folder: pathlib.Path) -> list[subprocess.Popen]:
    """Starts two processes of four devices each, their output in `folder`; the mesh of eight cuts
    the batch across them."""
    flags = [f"--coordinator=localhost:{free_port()}", "--processes=2"]
    return [
        start([*argv, *flags, f"--process={index}"], 4, folder / f"log{index}") for index in (0, 1)
    ]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def read_arrays(path: epath.Path) -> dict[str, np.ndarray]:
    """Every array of an item of a checkpoint, by its name, however it was laid out."""
    handler = ocp.PyTreeCheckpointHandler()
    plain = jax.tree.map(
        lambda _: ocp.RestoreArgs(restore_type=np.ndarray), handler.metadata(path).tree
    )
    tree = handler.restore(path, args=ocp.args.PyTreeRestore(restore_args=plain))
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(keys): leaf for keys, leaf in leaves}


def state_of(workdir: Any, step: int) -> dict[str, np.ndarray]:
    """Parameters, moments and counters of a step."""
    folder = epath.Path(workdir) / "checkpoints" / str(step)
    return {
        f"{item}{name}": leaf
        for item in ("params", "optimizer")
        for name, leaf in read_arrays(folder / item).items()
    }


def assert_same_bits(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name, leaf in found.items():
        np.testing.assert_array_equal(leaf, expected[name], err_msg=name, strict=True)


def targets_of(dataset: str, row_ids: np.ndarray) -> np.ndarray:
    """How many targets each row has: ids after the first, but begin marks and padding."""
    rows = TokenDataset.open(dataset)
    ids = rows.read("train", row_ids)
    return np.sum((ids[:, :-1] != rows.end_id) & (ids[:, 1:] != rows.begin_id), axis=1)
