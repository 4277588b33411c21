import pytest
from stand_ins import Machine


@pytest.fixture(scope="session")
def known(tmp_path_factory):
    return tmp_path_factory.mktemp("known")


@pytest.fixture
def machine(tmp_path, known):
    return Machine(tmp_path, known)
