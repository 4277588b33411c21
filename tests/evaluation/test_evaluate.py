"""evaluate: every held-out target once, nats over raw bytes, whatever the tokenizer."""

import gzip
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_files import write_checkpoint
from shapes import random_params

from pangu_tiny.data.dataset import TokenDataset
from pangu_tiny.data.prepare_data import prepare_data
from pangu_tiny.errors import UserError
from pangu_tiny.evaluation.evaluate import evaluate
from pangu_tiny.model.decoder import Decoder, logits
from pangu_tiny.model.shape import ModelShape
from pangu_tiny.text.documents import held_out
from pangu_tiny.tokenizer.model import Tokenizer
from pangu_tiny.topology.hardware import Hardware

LENGTH, FRACTION = 24, 0.3
SYLLABLES = ["the", "cat", "sat", "on", "größ", "er", "世界", "ran", "a", "way", "als", "12"]


@pytest.fixture(scope="module")
def documents():
    random = np.random.default_rng(0)
    words = ["".join(random.choice(SYLLABLES, random.integers(1, 4))) for _ in range(80)]
    texts = [" ".join(random.choice(words, random.integers(1, 20))) for _ in range(120)]
    return list(dict.fromkeys(texts))


VOCABULARIES = (330, 360)


@pytest.fixture(scope="module")
def runs(documents, tmp_path_factory):
    """The same text and held-out split under two tokenizers, and a checkpoint for each."""
    return [prepare(size, documents, tmp_path_factory.mktemp("run")) for size in VOCABULARIES]


def prepare(vocab_size, documents, folder):
    lines = "\n".join(json.dumps({"text": text}) for text in documents)
    (folder / "text.jsonl").write_text(lines)
    prepare_data(
        str(folder / "text.jsonl"),
        str(folder / "data"),
        sequence_length=LENGTH,
        vocab_size=vocab_size,
        held_out_fraction=FRACTION,
        processes=1,
    )
    rows = TokenDataset.open(folder / "data")
    tokenizer = Tokenizer(rows.tokenizer_bytes())
    shape = ModelShape(
        depth=1, width=16, heads=2, ffn_width=16, vocab_size=vocab_size, series_terms=2
    )
    params = random_params(shape)
    checkpoint = write_checkpoint(folder / "model", shape, params, tokenizer, LENGTH)
    return folder, checkpoint, shape, params, tokenizer


def evaluated(run, name="evaluation", **settings):
    folder, checkpoint, *_ = run
    hardware = Hardware(per_device_batch=1, loss_chunk=64)
    return evaluate(checkpoint, str(folder / "data"), str(folder / name), hardware, **settings)


def nats_of(run):
    """Σ −log p of all targets, by running every piece of every row on its own."""
    folder, _, shape, params, tokenizer = run
    rows = TokenDataset.open(folder / "data")
    pieces = []
    for row in rows.read("held_out", np.arange(rows.count("held_out"))):
        starts = [0, *(t for t in range(1, len(row)) if row[t] == tokenizer.begin_id)]
        for start, end in zip(starts, [*starts[1:], len(row)], strict=True):
            piece = list(row[start:end])
            while len(piece) > 1 and piece[-2:] == [tokenizer.end_id] * 2:
                piece.pop()  # padding
            if len(piece) > 1:
                pieces.append(piece)
    padded = np.zeros((len(pieces), LENGTH + 1), np.int32)
    for line, piece in zip(padded, pieces, strict=True):
        line[: len(piece)] = piece
    logits_btv = jax.jit(logits, static_argnums=0)(
        Decoder(shape), params, jnp.asarray(padded[:, :-1])
    )
    log_p = jax.nn.log_softmax(logits_btv)
    chosen = np.take_along_axis(np.asarray(log_p), padded[:, 1:, None], axis=-1)[..., 0]
    return -sum(
        chosen[index, : len(piece) - 1].sum(dtype=np.float64) for index, piece in enumerate(pieces)
    )


@pytest.mark.parametrize("which", [0, 1], ids=VOCABULARIES)
def test_bits_per_byte_follow_the_definition(runs, which, documents):
    """Targets are all tokens of the held-out documents and their end marks, those in the last
    partial batch included; bytes are raw UTF-8. A begin mark scored, or a row left over, fails."""
    run = runs[which]
    folder, *_, tokenizer = run
    apart = [text for text in documents if held_out(text, FRACTION)]
    targets = sum(len(tokenizer.encode(text)) + 1 for text in apart)
    size = sum(len(text.encode()) for text in apart)
    result = evaluated(run)
    assert TokenDataset.open(folder / "data").count("held_out") % 8, "no partial batch to test"
    assert (result["documents"], result["targets"], result["bytes"]) == (len(apart), targets, size)
    nats = nats_of(run)
    assert result["nats_per_token"] == pytest.approx(nats / targets, rel=1e-5)
    expected = nats / math.log(2) / size
    assert result["bits_per_byte"] == pytest.approx(expected, rel=1e-5)
    packed = sum(len(gzip.compress(text.encode(), 9)) for text in apart)
    assert result["gzip_9_bits_per_byte"] == pytest.approx(8 * packed / size)
    assert json.loads((folder / "evaluation" / "evaluation.json").read_text()) == result


def test_a_source_has_the_figures_of_its_rows_alone(runs, documents, tmp_path, capsys):
    """Those of a dataset of nothing else, to the order in which float32 adds up in a larger batch;
    the compressors' too. A source of which nothing is held out is named."""
    _, checkpoint, _, _, tokenizer = runs[0]
    (tmp_path / "tokenizer.model").write_bytes(tokenizer.model_bytes)
    unseen = next(text for text in documents if not held_out(text, FRACTION))
    texts = {"a": documents[:70], "b": documents[70:], "c": [unseen]}
    files = {name: tmp_path / f"{name}.jsonl" for name in texts}
    for name, file in files.items():
        file.write_text("\n".join(json.dumps({"text": text}) for text in texts[name]))

    def evaluate_on(names):
        prepare_data(
            {name: str(files[name]) for name in names},
            str(tmp_path / names / "data"),
            sequence_length=LENGTH,
            tokenizer=str(tmp_path / "tokenizer.model"),
            held_out_fraction=FRACTION,
            processes=1,
        )
        return evaluated((tmp_path / names, checkpoint))

    capsys.readouterr()
    result = evaluate_on("abc")
    lines = capsys.readouterr().out.splitlines()
    assert list(result["sources"]) == ["a", "b"]
    assert lines[-1] == "  c            nothing held out"
    for line, (name, figures) in zip(lines[-3:-1], result["sources"].items(), strict=True):
        alone = evaluate_on(name)
        expected = {figure: alone[figure] for figure in figures}
        assert figures == pytest.approx(expected, rel=1e-5)
        assert line.startswith(f"  {name}  ") and f"{figures['bits_per_byte']:.4f} bits" in line
    for figure in ("documents", "bytes", "targets"):
        assert sum(source[figure] for source in result["sources"].values()) == result[figure]
    saved = json.loads((tmp_path / "abc" / "evaluation" / "evaluation.json").read_text())
    assert saved == result


def test_evaluation_goes_with_its_settings(runs):
    """Run again in its workdir it gives the same; with another dtype it is another evaluation."""
    run = runs[0]
    once = evaluated(run)
    assert evaluated(run) == once
    with pytest.raises(UserError, match="dtype is 'float32' there, 'bfloat16' here"):
        evaluated(run, dtype="bfloat16")
    half = evaluated(run, "half", dtype="bfloat16")
    assert half["bits_per_byte"] == pytest.approx(once["bits_per_byte"], rel=0.02)
    with pytest.raises(UserError, match=r"evaluate\.dtype is 'float8', expected one of float32"):
        evaluated(run, "other", dtype="float8")


def test_a_dataset_of_another_tokenizer_is_refused(runs, tmp_path):
    (_, checkpoint, *_), (folder, *_) = runs
    with pytest.raises(UserError, match=r"was made with tokenizer .* reads "):
        evaluate(checkpoint, str(folder / "data"), str(tmp_path / "out"), Hardware())
    assert not (tmp_path / "out").exists(), "a refusal leaves nothing behind"


def test_nothing_held_out_is_refused(runs, tmp_path):
    folder, checkpoint, *_, tokenizer = runs[0]
    (tmp_path / "tokenizer.model").write_bytes(tokenizer.model_bytes)
    prepare_data(
        str(folder / "text.jsonl"),
        str(tmp_path / "data"),
        sequence_length=LENGTH,
        tokenizer=str(tmp_path / "tokenizer.model"),
        held_out_fraction=0.0,
        processes=1,
    )
    with pytest.raises(UserError, match="holds nothing out"):
        evaluate(checkpoint, str(tmp_path / "data"), str(tmp_path / "out"), Hardware())
