"""export-hf: what goes out comes in again, bit by bit, and is what `transformers` computes."""

import dataclasses
import json
import pathlib
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import tokenizers
from checkpoint_files import write_checkpoint
from safetensors.numpy import load_file
from shapes import TINY, random_params

from pangu_tiny import cli
from pangu_tiny.checkpoints.read import open_checkpoint
from pangu_tiny.convert.card import Told, card
from pangu_tiny.convert.export_hf import export_hf
from pangu_tiny.convert.import_hf import import_hf
from pangu_tiny.convert.llama import read_config
from pangu_tiny.errors import UserError
from pangu_tiny.vocabulary import huggingface

PLAIN = dataclasses.replace(TINY, series_terms=1, shortcut_ratio=0)


def assert_equal(found, wanted):
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for (path, leaf), other in zip(
        jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(wanted), strict=True
    ):
        np.testing.assert_array_equal(leaf, other, str(path))


@pytest.fixture
def checkpoint(tmp_path, tokenizer):
    """Random parameters of a shape, as training saves them."""

    def write(shape, scale=1.0):
        shape = dataclasses.replace(shape, vocab_size=tokenizer.vocab_size)
        params = jax.tree.map(lambda leaf: np.array(leaf) * np.float32(scale), random_params(shape))
        params["embedding"]["table"][shape.vocab_size :] = 0
        if not shape.tied:
            params["head"]["kernel"][:, shape.vocab_size :] = 0
        return write_checkpoint(tmp_path / "run", shape, params, tokenizer, 64)

    return write


@pytest.mark.parametrize(
    ("shape", "dtype", "shard_bytes"),
    [
        (dataclasses.replace(PLAIN, tied=True, heads=4, kv_heads=1, head_dim=6), "float16", 3000),
        (TINY, "bfloat16", 2**30),
        (dataclasses.replace(TINY, shortcut_ratio=0), "float32", 2**30),
    ],
    ids=["tied and grouped, in shards", "modules", "no shortcut"],
)
def test_import_of_an_export_gives_the_same_bits(shape, dtype, shard_bytes, checkpoint, tmp_path):
    source, out = checkpoint(shape), str(tmp_path / "out")
    export_hf(source, out, dtype=dtype, shard_bytes=shard_bytes)
    shards = sorted(pathlib.Path(out).glob("*.safetensors"))
    assert len(shards) == 1 if shard_bytes == 2**30 else len(shards) > 3
    import_hf(out, str(tmp_path / "again"))
    opened, again = open_checkpoint(source), open_checkpoint(str(tmp_path / "again"))
    assert (again.shape, str(again.dtype)) == (opened.shape, dtype)
    for name in ("begin_id", "end_id", "sequence_length"):
        assert again.about[name] == opened.about[name]
    kind = np.dtype(dtype)
    narrowed = jax.tree.map(lambda leaf: np.asarray(leaf).astype(kind), opened.params())
    assert_equal(again.params(), jax.tree.map(lambda leaf: leaf.astype("float32"), narrowed))
    assert again.tokenizer_bytes == opened.tokenizer_bytes
    export_hf(str(tmp_path / "again"), str(tmp_path / "second"), shard_bytes=shard_bytes)
    for file in shards:
        assert file.read_bytes() == (tmp_path / "second" / file.name).read_bytes()


@pytest.mark.parametrize("shape", [PLAIN, TINY], ids=["plain", "modules"])
def test_what_lies_in_the_folder(shape, checkpoint, tmp_path, tokenizer):
    """The config is read back, rows of padding are left out, and code is there if it is needed."""
    source, out = checkpoint(shape), tmp_path / "out"
    export_hf(source, str(out))
    found, opened = read_config(out / "config.json"), open_checkpoint(source)
    assert found.shape == opened.shape
    assert found.sequence_length == opened.about["sequence_length"]
    held = load_file(out / "model.safetensors")
    assert len(held["model.embed_tokens.weight"]) == tokenizer.vocab_size < 384
    assert len(held["lm_head.weight"]) == tokenizer.vocab_size
    generation = json.loads((out / "generation_config.json").read_text())
    assert generation["eos_token_id"] == opened.about["end_id"]
    written, code = json.loads((out / "config.json").read_text()), out / "modeling_pangu_pi.py"
    if shape is PLAIN:
        assert written["architectures"] == ["LlamaForCausalLM"] and not code.exists()
    else:
        assert written["auto_map"]["AutoConfig"] == "modeling_pangu_pi.PanguPiConfig"
        assert "class PanguPiConfig" in code.read_text()


def test_a_value_that_a_type_cannot_hold_is_named(checkpoint, tmp_path):
    with pytest.raises(UserError, match=r"values too large for dtype = 'float16'"):
        export_hf(checkpoint(PLAIN, scale=1e6), str(tmp_path / "out"), dtype="float16")
    assert not (tmp_path / "out" / "config.json").exists()


def test_an_interrupted_export_is_written_anew(checkpoint, tmp_path):
    source, out = checkpoint(PLAIN), tmp_path / "out"
    export_hf(source, str(out))
    whole = (out / "model.safetensors").read_bytes()
    (out / "config.json").unlink()
    (out / "model.safetensors").write_bytes(whole[:100])
    export_hf(source, str(out))
    assert (out / "model.safetensors").read_bytes() == whole


def test_a_tokenizer_that_gives_other_ids_is_refused(checkpoint, tmp_path, monkeypatch):
    """Merges in another order would pass unseen without the proof."""
    made = huggingface._merges
    monkeypatch.setattr(huggingface, "_merges", lambda vocabulary: made(vocabulary)[::-1])
    with pytest.raises(UserError, match=r"cannot be exported exactly: .* in Hugging Face's format"):
        export_hf(checkpoint(PLAIN), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_vocabulary_that_was_left_whole(tmp_path):
    """Its tokenizer.json goes out as it came, of whatever kind."""
    made = tokenizers.Tokenizer(tokenizers.models.Unigram([("<end>", 0.0), ("a", -1.0)], 0))
    stored = SimpleNamespace(
        digest="w", model_bytes=made.to_str().encode(), begin_id=None, end_id=0
    )
    shape = dataclasses.replace(PLAIN, vocab_size=2)
    run = write_checkpoint(tmp_path / "run", shape, random_params(shape), stored, 64)
    out = tmp_path / "out"
    export_hf(run, str(out))
    assert (out / "tokenizer.json").read_bytes() == stored.model_bytes
    config = json.loads((out / "tokenizer_config.json").read_text())
    assert config["eos_token"] == "<end>" and "bos_token" not in config


def test_all_end_marks_of_a_whole_vocabulary_go_out(write, tmp_path):
    """A chat model that knew but the first of them would not end its turn."""
    made = tokenizers.Tokenizer(tokenizers.models.Unigram([("<end>", 0.0), ("a", -1.0)], 0))
    file, source, run = tmp_path / "tokenizer.json", write(), str(tmp_path / "run")
    file.write_text(made.to_str())
    import_hf(source, run, tokenizer=str(file), whole_vocabulary=True)
    export_hf(run, str(tmp_path / "out"))
    for name in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "out" / name).read_text())["eos_token_id"] == [8, 9]


def test_what_is_told_must_be_of_the_checkpoint(checkpoint, dataset, tmp_path):
    source = checkpoint(PLAIN)
    with pytest.raises(UserError, match=r"dataset .* is .*, checkpoint .* read None"):
        export_hf(source, str(tmp_path / "out"), dataset=dataset.path)
    other = {"checkpoint": {"tokenizer": "x"}, "step": 3}
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation" / "identity.json").write_text(json.dumps(other))
    (tmp_path / "evaluation" / "evaluation.json").write_text("{}")
    with pytest.raises(UserError, match="is of another checkpoint than"):
        export_hf(source, str(tmp_path / "out"), evaluation=str(tmp_path / "evaluation"))


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"dtype": "float8"}, "export_hf.dtype is 'float8', expected one of None, float32"),
        ({"shard_bytes": 0}, "export_hf.shard_bytes is 0, expected"),
        ({"workdir": "gs://bucket/model"}, "expected a local folder"),
        ({"checkpoint": "nowhere"}, "nowhere"),
        ({"dataset": "nowhere"}, "nowhere"),
    ],
)
def test_mistakes_are_named(settings, named, checkpoint, tmp_path, capsys):
    given = {"checkpoint": checkpoint(PLAIN), "workdir": tmp_path / "out", **settings}
    flags = [f"--gin.export_hf.{name}={value}" for name, value in given.items()]
    assert cli.main(["export-hf", *flags]) == 2
    assert named in capsys.readouterr().err.strip().splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_a_folder_of_others_is_refused(checkpoint, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="is not empty and was not made by export-hf"):
        export_hf(checkpoint(PLAIN), str(tmp_path / "out"))


def test_the_card_tells_of_data_training_and_losses(checkpoint, dataset):
    """Its front matter is what the hub reads."""
    plain = opened = open_checkpoint(checkpoint(TINY))
    trained = {
        "steps": 3,
        "tokenizer": "t",
        "global_batch": 8,
        "sequence_length": 32,
        "optimizer": {"learning_rate": 1e-3, "weight_decay": 0.1},
        "checkpoint": None,
        "dtype": "float32",
    }
    opened = opened._replace(about={**opened.about, "identity": trained, "step": 2})
    names = ("nats_per_token", "bits_per_byte", "gzip_9_bits_per_byte")
    losses = {"sources": {}, **dict.fromkeys(names, 1.25)}
    task = {
        "title": "BoolQ",
        "split": "val",
        "questions": 20,
        "published": 3270,
        "metric": "accuracy",
    }
    scores = {"tasks": {"boolq": task | {"score": 61.234, "chance": None}}, "average": 61.234}
    arc = {"questions": 2376, "metric": "acc_norm,none", "score": 25.5}
    scores["lm_eval"] = {"lm-eval:arc_easy": arc, "lm-eval:of_words": arc | {"score": None}}
    text = card(Told(opened, "float32", dataset.description, losses, scores))
    assert (
        "| BoolQ | val | 20 of 3,270 | accuracy | 61.23 |  |" in text and "## Benchmarks\n" in text
    )
    assert "| lm-eval:arc_easy |  | 2,376 | acc_norm,none | 25.50 |  |" in text
    assert "of_words" not in text  # its metric is no share of right answers
    assert text.startswith('---\nlibrary_name: "transformers"\n')
    for heading in (
        "Shape",
        "Tokenizer",
        "Parameters",
        "Data",
        "Training",
        "Held-out loss",
        "Versions",
    ):
        assert f"## {heading}\n" in text
    assert "| steps | 2 of 3 |" in text and "| tokens | 512 |" in text
    assert "PanGu-π Pro" in text and "PanGu-π Pro" not in card(
        Told(plain, "float32", None, None, None)
    )
    assert "| all | 1.2500 | 1.2500 | 1.2500 |" in text
    assert f"| all | {opened.shape.parameters:,} |" in text
