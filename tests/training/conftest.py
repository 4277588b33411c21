"""One dataset and two finished runs for all."""

import pytest
from tiny_runs import command, prepare, run, start

from pangu_tiny.topology.hardware import Hardware


@pytest.fixture(scope="session")
def dataset(tmp_path_factory):
    return prepare(tmp_path_factory.mktemp("dataset"))


@pytest.fixture(scope="session")
def finished(dataset, tmp_path_factory):
    """An undisturbed run on the eight devices; whoever changes it makes a copy."""
    workdir = tmp_path_factory.mktemp("eight") / "run"
    run(dataset, workdir, tensorboard=True)
    return workdir


@pytest.fixture(scope="session")
def one_device(dataset, tmp_path_factory):
    """The same run by a process that has one device. It is this one that writes a profile: JAX's
    profiler crashes in a process in which a test has compiled for a TPU that is not there."""
    workdir = tmp_path_factory.mktemp("one") / "run"
    log = workdir.parent / "log"
    argv = command(dataset, workdir, Hardware(), profile_steps=[3, 4])
    assert start(argv, 1, log).wait() == 0, log.read_text()
    return workdir
