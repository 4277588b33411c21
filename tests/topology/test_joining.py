"""Processes that the platform tells of find one another by themselves; a single one joins none."""

import os
import subprocess
import sys

import pytest
from tiny_runs import free_port

HOST = {
    "JAX_PLATFORMS": "cpu",
    "JAX_FORCE_TPU_INIT": "1",  # else no chips are no TPU host
    "TPU_WORKER_HOSTNAMES": "127.0.0.1",
    "TPU_WORKER_ID": "0",
    "MEGASCALE_COORDINATOR_ADDRESS": "127.0.0.1",
    "MEGASCALE_SLICE_ID": "0",
}
"""What GKE's webhook sets on the only host of a slice."""
PROGRAM = """
import jax
from pangu_tiny.topology import joining, processes
from pangu_tiny.errors import UserError
try:
    joining.start(False, None, {processes}, None)
    print(processes.count(), processes.gather(processes.index()), len(jax.devices()))
except UserError as error:
    print(type(error).__name__, error)
"""


def start(processes=None, **environment):
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM.format(processes=processes)],
        env=os.environ | HOST | environment,
        stdout=subprocess.PIPE,
        text=True,
    )


def said(child):
    """What it prints; where it waits for others in vain, the test fails."""
    return child.communicate(timeout=120)[0]


@pytest.fixture(autouse=True)
def libtpu():
    """Without it JAX looks for no TPU host."""
    pytest.importorskip("libtpu")


@pytest.mark.pods
def test_two_slices_find_one_another():
    shared = {"JAX_COORDINATOR_PORT": str(free_port()), "MEGASCALE_NUM_SLICES": "2"}
    children = [start(MEGASCALE_SLICE_ID=str(number), **shared) for number in (0, 1)]
    assert [said(child) for child in children] == ["2 [0, 1] 16\n"] * 2


@pytest.mark.pods
def test_one_host_joins_nobody():
    """JAX would wait for ever."""
    child = start(MEGASCALE_NUM_SLICES="1")
    assert said(child) == "1 [0] 8\n"


@pytest.mark.pods
def test_a_host_of_several_may_be_taken_alone():
    child = start(processes=1, MEGASCALE_NUM_SLICES="2")
    assert said(child) == "1 [0] 8\n"


@pytest.mark.pods
def test_a_host_without_metadata_is_told():
    """A server that is not there: the port is closed."""
    child = start(GCE_METADATA_IP=f"127.0.0.1:{free_port()}")
    assert said(child).startswith("Unreached the metadata of this TPU host cannot be")
