"""A corpus as hubs have it, folders of Parquet, on gs://, prepared by Apache Beam into gs://."""

import contextlib
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from etils import epath
from tiny_runs import start

from pangu_tiny.data.dataset import TokenDataset
from pangu_tiny.data.prepare_data import prepare_data
from pangu_tiny.workdir import read_json

pytestmark = pytest.mark.pods

FILES, GROUPS = 3, 20
WORDS = ["the", "cat", "sat", "größer", "世界", "ran\n", "away", "1234"]


def write_corpus(folder):
    """Parquet files of several row groups, with columns that are not read, beside what hubs add."""
    random = np.random.default_rng(0)
    for number in range(FILES):
        file = folder / "data" / f"train-{number:05d}-of-{FILES:05d}.parquet"
        file.parent.mkdir(parents=True, exist_ok=True)
        texts = [" ".join(random.choice(WORDS, 40)) for _ in range(240)]
        columns = {"id": [f"{number}-{row}" for row in range(240)], "text": texts}
        buffer = pa.BufferOutputStream()
        pq.write_table(pa.table(columns), buffer, row_group_size=240 // GROUPS)
        file.write_bytes(buffer.getvalue().to_pybytes())
    (folder / "README.md").write_text("---\nlicense: odc-by\n---\n")
    (folder / ".gitattributes").write_text("*.parquet filter=lfs\n")


def test_killed_and_started_again_it_makes_the_same_rows(bucket, tokenizer_file, tmp_path):
    pytest.importorskip("apache_beam")
    settings = {"sequence_length": 24, "held_out_fraction": 0.2, "shard_bytes": 4000}
    for folder in (epath.Path(f"{bucket}/corpus"), epath.Path(tmp_path / "corpus")):
        write_corpus(folder)
    here = str(tmp_path / "rows")
    prepare_data(str(tmp_path / "corpus"), here, tokenizer=tokenizer_file, processes=1, **settings)

    there, log = epath.Path(f"{bucket}/rows"), tmp_path / "log"
    bindings = {**settings, "text": f"{bucket}/corpus", "workdir": there}
    bindings |= {"tokenizer": tokenizer_file, "runner": "DirectRunner"}
    flags = [f"--gin.prepare_data.{name}={value}" for name, value in bindings.items()]
    argv = [sys.executable, "-m", "pangu_tiny", "prepare-data", *flags]
    process = start(argv, 1, log)
    units = there / "units"
    while not (units.exists() and len(list(units.glob("*.json"))) > 1):
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=0.1)
            raise AssertionError(log.read_text())
    process.kill()
    process.wait()
    assert (
        not (there / "dataset.json").exists() and len(list(units.glob("*.json"))) < FILES * GROUPS
    )
    process = start(argv, 1, log)
    assert process.wait() == 0, log.read_text()

    found, expected = (TokenDataset.described(folder) for folder in (there, here))
    assert found.digest == expected.digest
    assert found.description["splits"] == expected.description["splits"]
    left_out = read_json(there / "dataset.json")["left_out"]["corpus"]
    assert {kind: files["count"] for kind, files in left_out.items()} == {"hidden": 1, "unknown": 1}
    for file in epath.Path(here).glob("*.array_record-*"):
        assert (there / file.name).read_bytes() == file.read_bytes(), file.name
