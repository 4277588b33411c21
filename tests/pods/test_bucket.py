"""What epath and TensorStore do on gs://, which the stages rest on."""

import numpy as np
import pytest
import tensorstore
from etils import epath

pytestmark = pytest.mark.pods


def test_files(bucket):
    folder = epath.Path(bucket) / "files"
    assert not folder.exists()
    (folder / "a.txt").write_text("größer")
    (folder / "deep" / "b.bin").write_bytes(b"\x00\x01")
    assert sorted(path.name for path in folder.iterdir()) == ["a.txt", "deep"]
    assert (folder / "a.txt").read_text() == "größer"
    assert (folder / "deep" / "b.bin").read_bytes() == b"\x00\x01"
    assert (folder / "a.txt").stat().length == 8
    folder.rmtree()
    assert not folder.exists()


def test_what_tensorstore_writes_epath_lists(bucket):
    values = np.arange(4, dtype=np.int32)
    spec = {"driver": "zarr3", "kvstore": f"{bucket}/arrays/x/"}
    array = tensorstore.open(spec, create=True, dtype=values.dtype, shape=[4]).result()
    array.write(values).result()
    assert "zarr.json" in [path.name for path in (epath.Path(bucket) / "arrays" / "x").iterdir()]
    np.testing.assert_array_equal(tensorstore.open(spec).result().read().result(), values)
