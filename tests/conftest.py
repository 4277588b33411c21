"""Eight virtual CPU devices for every test, where real inputs lie, and a small corpus: its texts,
a small tokenizer, and one dataset of them for all tests that only read."""

import json
import os
import pathlib

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = " ".join(
    (
        "--xla_force_host_platform_device_count=8",
        # The same programs, in machine code that is not optimised: what tests run takes
        # milliseconds, and optimising it took half of the time to compile.
        "--xla_backend_optimization_level=0",
        # On a busy machine one of eight devices may be that late for a collective; XLA ends the
        # process after 40 s.
        "--xla_cpu_collective_call_terminate_timeout_seconds=600",
    )
)

import jax
import numpy as np
import pytest

from pangu_tiny.data.dataset import TokenDataset
from pangu_tiny.data.prepare_data import prepare_data
from pangu_tiny.tokenizer.model import Tokenizer, train_tokenizer

REPOSITORY = pathlib.Path(__file__).parents[1]
_WORDS = ["the", "cat", "sat", "größer", "世界", "ran\n", "away", "1234", "  ", "🙂", "\t"]


_LONG = ("rounds", "inherit", "reproduce", "training")


def pytest_collection_modifyitems(items):
    """Files of few long tests first, so that no process is left alone with one in the end."""
    items.sort(key=lambda item: item.path.parent.name not in _LONG)


@pytest.fixture(scope="session", autouse=True)
def compiled_once(tmp_path_factory, request):
    """Compiled programs are kept, for child processes too (see `tiny_runs.start`), for all
    processes among which pytest shares the tests out, and in PANGU_TINY_COMPILED for later runs."""
    folder = tmp_path_factory.getbasetemp()
    if hasattr(request.config, "workerinput"):
        folder = folder.parent
    settings = {
        "jax_compilation_cache_dir": os.environ.get(
            "PANGU_TINY_COMPILED", str(folder / "compiled")
        ),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture(scope="session")
def real_data() -> pathlib.Path:
    """The folder of real tokenizers, checkpoints and corpora; the test skips where it is absent."""
    default = REPOSITORY.parent / "shared" / "data"
    folder = pathlib.Path(os.environ.get("PANGU_TINY_DATA", default))
    if not folder.is_dir():
        pytest.skip(f"no real inputs in {folder}; PANGU_TINY_DATA names another folder")
    return folder


@pytest.fixture(scope="session")
def texts():
    """200 documents, all different, from one word to longer than several rows."""
    random = np.random.default_rng(0)
    lengths = random.choice([1, 5, 20, 120], 200)
    return [f"{i}: " + " ".join(random.choice(_WORDS, n)) for i, n in enumerate(lengths)]


@pytest.fixture(scope="session")
def tokenizer(texts):
    return train_tokenizer(texts, 300)


@pytest.fixture(scope="session")
def tokenizer_file(tokenizer, tmp_path_factory):
    file = tmp_path_factory.mktemp("tokenizer") / "small.model"
    file.write_bytes(tokenizer.model_bytes)
    return str(file)


@pytest.fixture(scope="session")
def write_jsonl():
    def write(file, texts):
        file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        return str(file)

    return write


@pytest.fixture(scope="session")
def corpora(texts, write_jsonl, tmp_path_factory):
    """Two sources: 150 documents in "a", 50 in "b"."""
    folder = tmp_path_factory.mktemp("corpora")
    return {
        "a": write_jsonl(folder / "a.jsonl", texts[:150]),
        "b": write_jsonl(folder / "b.jsonl", texts[150:]),
    }


@pytest.fixture(scope="session")
def prepare(tokenizer_file):
    """prepare-data with small rows and many shards, in this process."""

    def prepare(text, workdir, **changes):
        settings = {
            "sequence_length": 24,
            "tokenizer": tokenizer_file,
            "held_out_fraction": 0.2,
            "shard_bytes": 4000,
            "processes": 1,
        } | changes
        prepare_data(text, str(workdir), **settings)
        return TokenDataset.open(workdir)

    return prepare


@pytest.fixture(scope="session")
def dataset(prepare, corpora, tmp_path_factory):
    return prepare(corpora, tmp_path_factory.mktemp("dataset") / "data")


@pytest.fixture(scope="session")
def read_all():
    """All rows of a split, in order."""

    def read_all(dataset, split="train"):
        return dataset.read(split, np.arange(dataset.count(split)))

    return read_all


@pytest.fixture(scope="session")
def tokenizer_of():
    return lambda dataset: Tokenizer(dataset.tokenizer_bytes())
