"""remap-dataset: the dataset that the text itself would give."""

import pathlib
import re

import numpy as np
import pytest

from pangu_tiny.data.dataset import TokenDataset
from pangu_tiny.errors import UserError
from pangu_tiny.model.shape import ModelShape
from pangu_tiny.vocabulary import remap_dataset as remap
from pangu_tiny.vocabulary.compress_tokenizer import compress_tokenizer
from pangu_tiny.vocabulary.count_tokens import count_tokens
from pangu_tiny.vocabulary.remap_dataset import remap_dataset


@pytest.fixture(scope="module")
def cut(dataset, tokenizer_file, tmp_path_factory):
    """A folder of compress-tokenizer, by method: 280 of 300 pieces."""
    folder = tmp_path_factory.mktemp("cut")
    count_tokens(str(folder / "counts"), dataset=dataset.path, processes=1)
    shape = ModelShape(depth=1, width=8, heads=1, ffn_width=8, vocab_size=280)
    for method in ("unused", "flow"):
        compress_tokenizer(
            str(folder / "counts"), tokenizer_file, str(folder / method), shape,
            vocab_size=280, method=method,
        )  # fmt: skip
    return folder


@pytest.mark.parametrize("processes", [1, 2])
def test_exact_is_as_prepared_from_text(dataset, cut, prepare, corpora, tmp_path, processes):
    remap_dataset(dataset.path, str(cut / "unused"), str(tmp_path / "a"), processes=processes)
    mapped = TokenDataset.open(tmp_path / "a")
    again = prepare(corpora, tmp_path / "b", tokenizer=str(cut / "unused" / "tokenizer.model"))
    assert mapped.description == again.description
    assert mapped.vocab_size == 280
    for shard in pathlib.Path(again.path).glob("tokens-*"):
        assert (tmp_path / "a" / shard.name).read_bytes() == shard.read_bytes()


def test_tfds_opens_it_though_a_unit_of_text_was_empty(dataset, cut, prepare, texts, tmp_path):
    import tensorflow_datasets as tfds

    for i, text in enumerate((texts[0], " ", *texts[1:40])):
        (tmp_path / f"{i:02}.txt").write_text(text)
    old = prepare(str(tmp_path), tmp_path / "old", shard_bytes=1024)
    remap_dataset(old.path, str(cut / "unused"), str(tmp_path / "new"), processes=1)
    infos = [(tmp_path / n / "dataset_info.json").read_text() for n in ("old", "new")]
    lengths = [re.findall(r'"shardLengths": \[.*?\]', info, re.DOTALL) for info in infos]
    assert lengths[0] == lengths[1]
    source = tfds.builder_from_directory(str(tmp_path / "new")).as_data_source("train")
    assert len(source) == TokenDataset.open(tmp_path / "new").count("train")
    assert len(source[len(source) - 1]["ids"]) == 25


def test_a_killed_run_goes_on(dataset, cut, tmp_path, monkeypatch):
    run, done = remap.UnitJob.run, []

    def stop(self, tokenizer):
        if len(done) == 2:
            raise KeyboardInterrupt
        run(self, tokenizer)
        done.append(self.index)

    monkeypatch.setattr(remap.UnitJob, "run", stop)
    with pytest.raises(KeyboardInterrupt):
        remap_dataset(dataset.path, str(cut / "unused"), str(tmp_path / "w"), processes=1)
    first = list(done)
    monkeypatch.setattr(
        remap.UnitJob, "run", lambda *given: (done.append(given[0].index), run(*given))
    )
    remap_dataset(dataset.path, str(cut / "unused"), str(tmp_path / "w"), processes=1)
    assert len(done) == len(set(done)) > len(first)
    remap_dataset(dataset.path, str(cut / "unused"), str(tmp_path / "whole"), processes=1)
    again = TokenDataset.open(tmp_path / "w")
    assert again.digest == TokenDataset.open(tmp_path / "whole").digest


def test_what_is_not_exact_has_to_be_asked_for(dataset, cut, tmp_path, tokenizer_of):
    with pytest.raises(UserError, match=r"cut by 'flow'.*approximate = True"):
        remap_dataset(dataset.path, str(cut / "flow"), str(tmp_path / "w"))
    assert not (tmp_path / "w").exists()
    remap_dataset(
        dataset.path, str(cut / "flow"), str(tmp_path / "w"), approximate=True, processes=1
    )
    mapped = TokenDataset.open(tmp_path / "w")
    texts = [
        [tokenizer_of(d).decode(ids[1:-1]) for _, ids in d.documents("train")]
        for d in (dataset, mapped)
    ]
    assert texts[0] == texts[1]
    assert np.max(mapped.read("train", np.arange(mapped.count("train")))) < 280


def test_what_does_not_belong_together_is_refused(dataset, cut, prepare, corpora, tmp_path):
    with pytest.raises(UserError, match=r"has no id_map\.json"):
        remap_dataset(dataset.path, dataset.path, str(tmp_path / "w"))
    remap_dataset(dataset.path, str(cut / "unused"), str(tmp_path / "a"), processes=1)
    with pytest.raises(UserError, match="was cut out of"):
        remap_dataset(str(tmp_path / "a"), str(cut / "unused"), str(tmp_path / "w"))
    (tmp_path / "id_map.json").write_text('{"a": 1}')
    with pytest.raises(UserError, match="is not what compress-tokenizer writes"):
        remap_dataset(dataset.path, str(tmp_path), str(tmp_path / "w"))
    with pytest.raises(UserError, match="processes is 0"):
        remap_dataset(dataset.path, str(cut / "unused"), str(tmp_path / "w"), processes=0)
