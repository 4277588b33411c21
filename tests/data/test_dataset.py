"""A dataset by its numbers: rows in any order, and damage that is never read as rows."""

import json
import resource
import shutil

import numpy as np
import pytest

from pangu_tiny.data import dataset as module
from pangu_tiny.data import records
from pangu_tiny.data.dataset import TokenDataset
from pangu_tiny.errors import UserError


@pytest.fixture
def copy(dataset, tmp_path):
    shutil.copytree(dataset.path, tmp_path / "copy")
    return tmp_path / "copy"


def test_rows_come_in_any_order_with_repeats(dataset, read_all):
    rows = read_all(dataset)
    order = np.random.default_rng(0).integers(0, len(rows), 100)
    found = dataset.read("train", order)
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found, rows[order])
    assert dataset.read("train", np.array([], int)).shape == (0, 25)
    assert len(dataset.description["splits"]["train"]["shards"]) > 3, "one shard proves nothing"


@pytest.mark.parametrize("row", [-1, 10**6])
def test_rows_that_are_not_there(dataset, row):
    with pytest.raises(IndexError, match="train has rows 0 to"):
        dataset.read("train", np.array([0, row]))


def test_the_digest_is_of_content(dataset, corpora, prepare, tmp_path):
    """Not of names and places; of the order, though."""
    moved = {name: str(shutil.copy(path, tmp_path / f"{name}-moved.jsonl"))
             for name, path in corpora.items()}  # fmt: skip
    assert prepare(moved, tmp_path / "same").digest == dataset.digest
    swapped = dict(reversed(corpora.items()))
    assert prepare(swapped, tmp_path / "swapped").digest != dataset.digest


def test_a_copy_reads_the_same(copy, dataset, read_all):
    opened = TokenDataset.open(copy)
    assert opened.digest == dataset.digest
    np.testing.assert_array_equal(read_all(opened), read_all(dataset))


def first_shard(copy):
    return sorted(copy.glob("tokens-train*"))[1]


def test_missing_and_truncated_shards_are_named_when_opened(copy):
    shard = first_shard(copy)
    content = shard.read_bytes()
    shard.write_bytes(content[:-100])
    with pytest.raises(UserError, match=f"{shard.name} has {len(content) - 100} bytes, expected"):
        TokenDataset.open(copy)
    shard.unlink()
    with pytest.raises(UserError, match=f"{shard.name} is missing"):
        TokenDataset.open(copy)


def test_overwritten_shards_are_named_when_read(copy, read_all):
    """As large as it was, but not what it was: the checksums of ArrayRecord find that."""
    shard = first_shard(copy)
    content = bytearray(shard.read_bytes())
    content[len(content) // 2 :] = bytes(len(content) - len(content) // 2)
    shard.write_bytes(content)
    with pytest.raises(UserError, match=f"{shard.name} cannot be read"):
        read_all(TokenDataset.open(copy))


def test_ids_beyond_the_vocabulary_are_named(copy, read_all):
    description = json.loads((copy / "dataset.json").read_text())
    description["vocab_size"] = 280
    (copy / "dataset.json").write_text(json.dumps(description))
    with pytest.raises(UserError, match=r"holds token id 29\d, expected ids below 280"):
        read_all(TokenDataset.open(copy))


def test_another_tokenizer_in_the_folder_is_refused(copy, real_data):
    shutil.copy(real_data / "tokenizers" / "mistral_v1_32000.model", copy / "tokenizer.model")
    with pytest.raises(UserError, match="the dataset was written with"):
        TokenDataset.open(copy).tokenizer_bytes()


def test_folders_that_are_no_dataset_are_refused(copy, tmp_path):
    with pytest.raises(UserError, match=r"has no dataset\.json, expected a folder that prepare"):
        TokenDataset.open(tmp_path)
    description = json.loads((copy / "dataset.json").read_text())
    (copy / "dataset.json").write_text(json.dumps(description | {"packing": 99}))
    with pytest.raises(UserError, match="packing rule 99, expected 1: prepare it again"):
        TokenDataset.open(copy)
    for content, said in (("", "is empty"), (json.dumps(description)[:99], "is not JSON")):
        (copy / "dataset.json").write_text(content)
        with pytest.raises(UserError, match=rf"copy/dataset\.json is damaged: it {said}"):
            TokenDataset.open(copy)


def test_unknown_splits_are_refused(dataset):
    with pytest.raises(UserError, match=r"has splits \['train', 'held_out'\]; 'test' was asked"):
        dataset.count("test")


def test_more_shards_than_files_may_be_open(dataset, read_all, monkeypatch):
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    asked = []
    monkeypatch.setattr(module.resource, "getrlimit", lambda _: (8, hard))
    monkeypatch.setattr(module.resource, "setrlimit", lambda _, limits: asked.append(limits))
    TokenDataset.open(dataset.path)
    shards = sum(len(s["shards"]) for s in dataset.description["splits"].values())
    assert asked == [(8 + shards, hard)]


@pytest.mark.parametrize(("vocab_size", "dtype"), [(2**16, "<u2"), (2**16 + 1, "<i4")])
def test_ids_take_two_bytes_where_they_fit(vocab_size, dtype):
    found = records.row_dtype(vocab_size)
    assert found == np.dtype(dtype)
    row = np.array([0, 7, vocab_size - 1], found)
    record = records.encode_row(row)
    assert records.decode_rows([record], 3, found).tolist() == [row.tolist()]


def test_records_are_those_that_tfds_writes():
    for length in (3, 60, 2049, 9000):  # lengths that take one, two and three bytes in the record
        row = np.arange(length).astype("<u2")
        features = records.tfds_features(length, row.dtype)
        assert records.encode_row(row) == features.serialize_example({"ids": row})


def test_rows_on_gs_are_refused_before_anything_is_copied(dataset, monkeypatch):
    """ArrayRecord reads local files only; a mounted bucket is one."""
    described = TokenDataset(f"gs://bucket/{dataset.path}", dataset.description)
    monkeypatch.setattr(TokenDataset, "described", classmethod(lambda *_: described))
    with pytest.raises(UserError, match=r"dataset gs://bucket/d .* mount the bucket \(gcsfuse\)"):
        TokenDataset.open("gs://bucket/d")
