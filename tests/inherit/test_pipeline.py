"""From a teacher and its text to a small model that trains on, through every stage."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import tiny_runs
from shapes import random_params
from teachers import KINDS, save

from pangu_tiny.checkpoints.read import open_checkpoint
from pangu_tiny.data.dataset import TokenDataset
from pangu_tiny.errors import UserError
from pangu_tiny.inherit.cut_list import CutList
from pangu_tiny.inherit.inherit import inherit
from pangu_tiny.inherit.layers import LayerChoice
from pangu_tiny.inherit.masks import MaskTraining
from pangu_tiny.inherit.rank_teacher import rank_teacher
from pangu_tiny.topology.hardware import Hardware
from pangu_tiny.vocabulary.compress_tokenizer import compress_tokenizer
from pangu_tiny.vocabulary.count_tokens import count_tokens

SIZE = 290


@pytest.fixture(scope="module")
def shape():
    return dataclasses.replace(KINDS["grouped"], vocab_size=300)


@pytest.fixture(scope="module")
def small(shape):
    changes = {"depth": 2, "width": 16, "heads": 4, "kv_heads": 2, "ffn_width": 24}
    return dataclasses.replace(shape, vocab_size=SIZE, **changes, series_terms=2, shortcut_ratio=8)


@pytest.fixture(scope="module")
def made(shape, small, dataset, corpora, prepare, tmp_path_factory):
    """Folders by the stage that made them."""
    folder = tmp_path_factory.mktemp("pipeline")
    rows = TokenDataset.open(dataset.path)
    params = random_params(shape)
    teacher = save(
        folder / "teacher",
        shape,
        params,
        tokenizer=(rows.tokenizer_digest, rows.tokenizer_bytes()),
        sequence_length=64,
    )
    big = str(folder / "big.model")
    (folder / "big.model").write_bytes(rows.tokenizer_bytes())
    count_tokens(str(folder / "counts"), dataset=dataset.path, processes=1)
    compress_tokenizer(str(folder / "counts"), big, str(folder / "tokenizer"), small, SIZE)
    compact = prepare(
        corpora, folder / "data", tokenizer=str(folder / "tokenizer" / "tokenizer.model")
    )
    rank_teacher(
        teacher,
        str(folder / "importance"),
        Hardware(fsdp=8),
        LayerChoice(first=0, last=0),
        MaskTraining(),
        dataset.path,
        method="activation",
        model=small,
        calibration_batches=2,
        batch_size=8,
    )
    return folder, params, compact


def cut(folder, workdir, small, **changes):
    settings = {"importance": folder / "importance", "tokenizer": folder / "tokenizer"} | changes
    settings = {
        name: value and str(value) if name in ("importance", "tokenizer") else value
        for name, value in settings.items()
    }
    choice = LayerChoice(first=0, last=0)
    return inherit(str(folder / "teacher"), str(workdir), choice, small, **settings)


def test_a_small_model_trains_on(made, small, tmp_path):
    """On rows of the compact tokenizer, shorter than the teacher allows; the modules that are
    new learn too."""
    folder, params, compact = made
    cuts = cut(folder, tmp_path / "cut", small, calibrate_norms=True)
    opened = open_checkpoint(str(tmp_path / "cut"))
    assert opened.tokenizer_bytes == compact.tokenizer_bytes()
    id_map = json.loads((folder / "tokenizer" / "id_map.json").read_text())
    assert cuts.vocabulary == id_map["new_to_old"]
    kept = params["embedding"]["table"][np.array(cuts.vocabulary)][:, np.array(cuts.embed)]
    before = opened.params()
    np.testing.assert_array_equal(before["embedding"]["table"][:SIZE], kept)
    done = tiny_runs.run(
        compact.path, tmp_path / "model", model=small, checkpoint=str(tmp_path / "cut"), steps=2
    )
    assert done.step == 2
    after = open_checkpoint(str(tmp_path / "model")).params()
    for part, name in (("shortcut", "up"), ("ffn", "series_scale"), ("ffn", "gate")):
        assert (after["blocks"][part][name] != before["blocks"][part][name]).any()
    other = tiny_runs.prepare(tmp_path / "other", vocab_size=280, sequence_length=24)
    with pytest.raises(UserError, match=r"was made with tokenizer .* checkpoint .* reads"):
        tiny_runs.run(other, tmp_path / "no", model=small, checkpoint=str(tmp_path / "cut"))


def test_a_foreign_map_is_refused(made, small, tmp_path):
    folder, _, _ = made
    foreign = shutil.copytree(folder / "tokenizer", tmp_path / "foreign")
    file = foreign / "id_map.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"old_digest": "0" * 64}))
    with pytest.raises(UserError, match=r"was cut out of 000000000000, teacher .* has "):
        cut(folder, tmp_path / "no", small, tokenizer=foreign)
    assert not (tmp_path / "no").exists()


def test_a_vocabulary_left_whole_goes_with_no_other(made, shape, small, tmp_path):
    folder, params, _ = made
    teacher = save(tmp_path / "teacher", shape, params, tokenizer=("w", b"{}"))
    choice, whole = LayerChoice(), dataclasses.replace(shape, series_terms=2)
    with pytest.raises(UserError, match=r"checkpoint .* was imported with its vocabulary whole"):
        inherit(teacher, str(tmp_path / "no"), choice, whole, tokenizer=str(folder / "tokenizer"))


def test_a_list_goes_with_its_tokenizer(made, small, tmp_path):
    folder, _, _ = made
    cut(folder, tmp_path / "list", small, cuts_only=True)
    listed = str(tmp_path / "list" / "cuts.json")
    with pytest.raises(UserError, match=r"are for tokenizer .*, inherit\.tokenizer is None"):
        cut(folder, tmp_path / "a", None, cuts=listed, tokenizer=None)
    with pytest.raises(UserError, match=r"cuts .* make ModelShape.*, but ModelShape is bound"):
        cut(folder, tmp_path / "b", dataclasses.replace(small, depth=1), cuts=listed)
    assert cut(folder, tmp_path / "c", None, cuts=listed) == CutList.read(listed)


def test_norms_need_a_dataset(made, small, tmp_path):
    folder, _, _ = made
    whole = {"depth": 4, "width": 24, "heads": 6, "kv_heads": 3, "ffn_width": 40}
    target = dataclasses.replace(small, **whole)
    with pytest.raises(UserError, match=r"calibrate_norms needs inherit\.importance"):
        cut(folder, tmp_path / "no", target, importance=None, calibrate_norms=True)
