"""Eight virtual CPU devices for every test, and where real inputs lie."""

import os
import pathlib

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = " ".join(
    (
        "--xla_force_host_platform_device_count=8",
        # The same programs, in machine code that is less optimised: what tests run takes
        # milliseconds, and optimising it took half of the time to compile.
        "--xla_backend_optimization_level=1",
    )
)

import pytest

REPOSITORY = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope="session")
def real_data() -> pathlib.Path:
    """The folder of real tokenizers, checkpoints and corpora; the test skips where it is absent."""
    default = REPOSITORY.parent / "shared" / "data"
    folder = pathlib.Path(os.environ.get("PANGU_TINY_DATA", default))
    if not folder.is_dir():
        pytest.skip(f"no real inputs in {folder}; PANGU_TINY_DATA names another folder")
    return folder
