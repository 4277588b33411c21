"""What the stages rest on where a workdir is on gs://, which has no folders and renames nothing."""

import numpy as np
import pytest
import tensorstore
from etils import epath

from pangu_tiny.arrays import read_arrays, write_arrays
from pangu_tiny.errors import UserError
from pangu_tiny.training import metrics
from pangu_tiny.training.metrics import MetricsLog, RowLosses, read_metrics, read_row_losses
from pangu_tiny.workdir import claim, replaced, write_atomically

pytestmark = pytest.mark.pods


@pytest.fixture
def folder(bucket, request):
    return epath.Path(bucket) / request.node.name


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_files_of_epath(folder):
    assert not folder.exists()
    (folder / "a.txt").write_text("größer")
    (folder / "deep" / "b.bin").write_bytes(b"\x00\x01")
    assert names(folder) == ["a.txt", "deep"] and (folder / "deep").is_dir()
    assert (folder / "a.txt").read_text() == "größer" and (folder / "a.txt").stat().length == 8
    assert (folder / "deep" / "b.bin").read_bytes() == b"\x00\x01"
    folder.rmtree()
    assert not folder.exists()


def test_arrays_of_tensorstore(folder):
    values = np.arange(4, dtype=np.int32)
    spec = {"driver": "zarr3", "kvstore": f"{folder}/x/"}
    array = tensorstore.open(spec, create=True, dtype=values.dtype, shape=[4]).result()
    array.write(values).result()
    np.testing.assert_array_equal(tensorstore.open(spec).result().read().result(), values)


def test_what_others_write_is_seen(folder):
    """Other processes, and TensorStore in this one: a listing that was kept would hide it."""
    (folder / "5" / "done").write_text("")
    assert names(folder) == ["5"] and not (folder / "6").exists()
    store = tensorstore.KvStore.open(f"{folder}/").result()
    store.write("5/more", b"").result()
    store.write("6/done", b"").result()
    assert (folder / "5" / "more").exists() and (folder / "6").exists()
    assert names(folder) == ["5", "6"]


def test_a_file_is_whole_or_not_at_all(folder, caplog):
    """A file of gs:// that is closed half-written is there, and passes for whole."""
    file = folder / "a.npz"
    with pytest.raises(ZeroDivisionError), replaced(file) as part, part.open("wb") as stream:
        stream.write(b"half")
        stream.write(1 / 0)
    assert not folder.exists()
    write_arrays(file, {"x": np.arange(3)})
    np.testing.assert_array_equal(read_arrays(file)["x"], np.arange(3))
    write_atomically(folder / "b", "größer")
    assert (folder / "b").read_bytes() == "größer".encode()
    assert names(folder) == ["a.npz", "b"], "nothing temporary is left"
    assert not caplog.records, "it was renamed, which is copied, and gcsfs warns of it"


def test_figures_come_with_checkpoints(folder, monkeypatch):
    """Not line by line, since each would write all lines again: each is written once, with
    TensorBoard's events. A run that goes on drops what came later."""
    writes = []

    def write(path, content):
        writes.append(content.count("\n"))
        write_atomically(path, content)

    monkeypatch.setattr(metrics, "write_atomically", write)
    log = MetricsLog(folder, 0)
    log.log(0, loss=3.0)
    log.log(1, loss=2.0)
    assert not read_metrics(str(folder)) and not (folder / "tensorboard").exists()
    log.flush(2)
    assert [line["loss"] for line in read_metrics(str(folder))] == [3.0, 2.0]
    log.log(2, loss=1.0)
    log.flush(3)
    log.close()
    assert writes == [2, 1]
    assert [line["loss"] for line in read_metrics(str(folder))] == [3.0, 2.0, 1.0]
    events = [file.read_bytes() for file in (folder / "tensorboard").iterdir()]
    assert len(events) == 2 and all(b"loss" in event for event in events)
    MetricsLog(folder, 2)
    assert [line["loss"] for line in read_metrics(str(folder))] == [3.0, 2.0]


def test_losses_of_rows(folder):
    """From an empty prefix, which cannot be listed, to a run that goes back."""

    def add(losses, step):
        losses.add(step, np.array([7]), np.array([0.5]), np.array([3]))
        losses.flush(step + 1)

    assert len(read_row_losses(str(folder))) == 0
    losses = RowLosses(folder, 0)
    add(losses, 0)
    add(losses, 1)
    assert read_row_losses(str(folder))["step"].tolist() == [0, 1]
    RowLosses(folder, 1)
    assert read_row_losses(str(folder))["step"].tolist() == [0]


def test_a_bucket_that_is_not_there_is_named(bucket):
    with pytest.raises(UserError, match="workdir gs://none-such/run cannot be written: "):
        claim("gs://none-such/run", "train", {})
