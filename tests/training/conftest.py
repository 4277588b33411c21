"""One dataset for all, and compiled programs that are kept, for child processes too."""

import jax
import pytest
from tiny_runs import prepare


@pytest.fixture(scope="session", autouse=True)
def compiled_once(tmp_path_factory):
    settings = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
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
def dataset(tmp_path_factory):
    return prepare(tmp_path_factory.mktemp("dataset"))
