"""Processes whose work is done end in order, while each still tells the others that it is there."""

import subprocess
import sys

from tiny_runs import free_port

PROGRAM = """
import sys
from pangu_tiny.topology import ending, joining
ending.BEAT_SECONDS = 0.0005  # so that the end meets a thread that talks
joining.start(False, sys.argv[1], 2, int(sys.argv[2]))
"""


def test_no_thread_outlives_the_service_or_the_interpreter():
    """A process would crash after all its work: eleven of twelve did where nothing waited."""
    for _ in range(2):
        address = f"localhost:{free_port()}"
        children = [
            subprocess.Popen([sys.executable, "-c", PROGRAM, address, process])
            for process in ("0", "1")
        ]
        assert [child.wait() for child in children] == [0, 0]
