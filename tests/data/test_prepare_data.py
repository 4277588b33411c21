"""prepare-data: the same dataset however it was made, all of it accounted for."""

import gzip
import io
import itertools
import json
import lzma
import pathlib
import subprocess
import sys
import time

import numpy as np
import pytest
import sentencepiece

from pangu_tiny.data.dataset import TokenDataset
from pangu_tiny.data.describe import report
from pangu_tiny.data.prepare_data import prepare_data
from pangu_tiny.data.rows import read_marks
from pangu_tiny.errors import UserError
from pangu_tiny.text.documents import held_out
from pangu_tiny.tokenizer import proto
from pangu_tiny.tokenizer.model import Tokenizer, train_tokenizer

RUN = (".lock", "environment.json", "config.gin")  # say how a dataset was made, not what it is


def content(folder):
    """Every file by its name, but what tells of the run."""
    files = [p for p in pathlib.Path(folder).rglob("*") if p.is_file() and p.name not in RUN]
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


def command(corpora, workdir, tokenizer_file, **changes):
    settings = {
        "text": corpora,
        "workdir": workdir,
        "sequence_length": 24,
        "tokenizer": tokenizer_file,
        "held_out_fraction": 0.2,
        "shard_bytes": 4000,
    } | changes
    flags = [f"--gin.prepare_data.{name}={value}" for name, value in settings.items()]
    return [sys.executable, "-m", "pangu_tiny", "prepare-data", *flags]


def split_texts(texts, split):
    return [text for text in texts if held_out(text, 0.2) == (split == "held_out")]


def test_the_documents_come_back_in_order(dataset, texts, tokenizer):
    for split in ("train", "held_out"):
        found = [
            (source, tokenizer.decode(ids[1:-1].tolist()))
            for source, ids in dataset.documents(split)
        ]
        chosen = [(int(i >= 150), t) for i, t in enumerate(texts)]
        assert found == [pair for pair in chosen if held_out(pair[1], 0.2) == (split != "train")]


def test_dataset_json_accounts_for_everything(dataset, texts, tokenizer, read_all):
    assert dataset.description["skipped"]["empty"] == 0
    for split in ("train", "held_out"):
        counts = dataset.description["splits"][split]
        chosen = split_texts(texts, split)
        tokens = [len(tokenizer.encode(text)) + 2 for text in chosen]
        rows = read_all(dataset, split)
        marked = read_marks(rows, dataset.begin_id, dataset.end_id)
        assert counts["documents"] == len(chosen)
        assert counts["bytes"] == sum(len(text.encode()) for text in chosen)
        assert counts["tokens"] == sum(tokens)
        assert counts["targets"] == sum(tokens) - len(chosen) == int(marked.weights.sum())
        assert counts["rows"] == len(rows) == sum(shard["rows"] for shard in counts["shards"])
        lone = sum(
            tokenizer.kinds[i] == proto.BYTE for text in chosen for i in tokenizer.encode(text)
        )
        assert counts["unknown_bytes"] == lone and 0 < counts["cut_documents"] < len(chosen)
        assert counts["normalised_bytes"] == counts["bytes"]
        kinds = ("rows", "documents", "bytes", "tokens", "targets", "padding")
        for kind in (*kinds, "normalised_bytes", "unknown_bytes"):
            assert counts[kind] == sum(counts["sources"][name][kind] for name in "ab"), kind
    kept_out = [text.encode() for text in split_texts(texts, "held_out")]
    assert counts["gzip_bytes"] == sum(len(gzip.compress(text, 9)) for text in kept_out)
    assert counts["xz_bytes"] == sum(len(lzma.compress(text, preset=9)) for text in kept_out)


def test_a_long_document_has_the_size_that_xz_gives_it(prepare, write_jsonl, tmp_path):
    """The dictionary is cut to the document's size, which must not change what xz makes of it."""
    random = np.random.default_rng(0)
    letters = random.integers(97, 123, 5000, np.uint8).tobytes().decode()
    long = "".join(letters[i : i + 50] for i in random.integers(0, 4950, 4000))
    variants = [f"{n} {long}" for n in range(20)]
    kept_out = next(text for text in variants if held_out(text, 0.2))
    trained = next(text for text in variants if not held_out(text, 0.2))
    file = write_jsonl(tmp_path / "long.jsonl", [kept_out, trained])
    found = prepare(file, tmp_path / "w").description["splits"]["held_out"]
    assert found["documents"] == 1
    assert found["xz_bytes"] == len(lzma.compress(kept_out.encode(), preset=9))
    assert found["gzip_bytes"] == len(gzip.compress(kept_out.encode(), 9))
    assert found["gzip_bytes"] != len(gzip.compress(kept_out.encode(), 6))


def test_sources_are_packed_apart(dataset, read_all):
    """A row has one source, and the rows of a source are neighbours."""
    rows = read_all(dataset)
    ids = dataset.source_ids("train", np.arange(len(rows)))
    assert list(ids) == sorted(ids) and set(ids) == {0, 1}
    (first_a, count_a), (first_b, count_b) = dataset.source_rows("train")
    assert (first_a, first_b, count_a + count_b) == (0, count_a, len(rows))
    assert rows[first_b][0] == dataset.begin_id


def test_tfds_reads_the_same_rows(dataset, read_all):
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(dataset.path)
    for split in ("train", "held_out"):
        source = builder.as_data_source(split)
        found = np.array([source[index]["ids"] for index in range(len(source))])
        np.testing.assert_array_equal(found, read_all(dataset, split))
    assert "tensorflow" not in sys.modules


def test_large_ids_take_four_bytes(real_data, write_jsonl, texts, tmp_path, prepare, read_all):
    """InternLM's 103,168 pieces do not fit the two bytes that small vocabularies take."""
    import tensorflow_datasets as tfds

    model = str(real_data / "tokenizers" / "internlm_v7_sft.model")
    file = write_jsonl(tmp_path / "a.jsonl", [*texts[:50], "汉语的词 " * 50])
    found = prepare(file, tmp_path / "w", tokenizer=model)
    rows = read_all(found)
    assert rows.max() >= 2**16
    tokenizer = Tokenizer.open(model)
    for _, ids in found.documents("train"):
        assert tokenizer.encode(tokenizer.decode(ids[1:-1].tolist())) == ids[1:-1].tolist()
    source = tfds.builder_from_directory(found.path).as_data_source("train")
    np.testing.assert_array_equal(source[len(rows) - 1]["ids"], rows[-1])


def test_processes_do_not_change_the_dataset(dataset, corpora, tokenizer_file, tmp_path):
    prepare_data(
        corpora, str(tmp_path / "two"), 24, tokenizer=tokenizer_file, held_out_fraction=0.2,
        shard_bytes=4000, processes=2,
    )  # fmt: skip
    assert content(tmp_path / "two") == content(dataset.path)


def test_beam_makes_the_same_bytes(dataset, prepare, corpora, tmp_path):
    pytest.importorskip("apache_beam")
    prepare(corpora, tmp_path / "w", runner="DirectRunner")
    assert content(tmp_path / "w") == content(dataset.path)
    with pytest.raises(UserError, match=r"prepare_data\.runner_options are those of a runner"):
        prepare(corpora, tmp_path / "no", runner_options=["--x=1"])


def test_shards_change_the_packing_and_nothing_else(dataset, prepare, corpora, tmp_path):
    """Each unit of text is packed by itself, so the digest differs; the documents do not."""
    whole = prepare(corpora, tmp_path / "w", shard_bytes=2**20)
    assert whole.digest != dataset.digest
    assert len(whole.description["splits"]["train"]["shards"]) == 2
    ours, theirs = (
        [ids.tolist() for _, ids in d.documents("train")] for d in (whole, dataset)
    )  # fmt: skip
    assert ours == theirs


def living_processes(group):
    """Whether a process of the group lives, a zombie not counted."""
    for file in pathlib.Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, pgrp = file.read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue  # it ended just now
        if int(pgrp) == group and state != "Z":
            return True
    return False


@pytest.mark.pods
def test_killed_and_started_again_it_ends_in_the_same_bytes(
    dataset, corpora, tokenizer_file, tmp_path
):
    """Killed after the first result, whatever the workers are then in the middle of; killed again
    and again until it comes through."""
    workdir = tmp_path / "w"
    argv = command(corpora, workdir, tokenizer_file, processes=2)
    kills = 0
    for wanted in itertools.count(1):
        process = subprocess.Popen(
            argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        while process.poll() is None:
            if kills < 3 and len(list((workdir / "units").glob("?????.json"))) >= 2 * wanted:
                process.kill()
                kills += process.wait() == -9
                deadline = time.monotonic() + 60
                while living_processes(group=process.pid):
                    assert time.monotonic() < deadline, "workers live on without their parent"
        if not process.returncode:
            break
    assert kills >= 1
    assert content(workdir) == content(dataset.path)


def test_a_full_disk_is_one_line_and_the_stage_goes_on(dataset, corpora, tokenizer_file, tmp_path):
    argv = command(corpora, tmp_path / "w", tokenizer_file, processes=2)
    limited = ["bash", "-c", "trap '' XFSZ; ulimit -f 4; exec \"$@\"", "-", *argv]
    found = subprocess.run(limited, capture_output=True, text=True, check=False)
    assert found.returncode == 2, found.stderr
    assert "File too large" in found.stderr.splitlines()[-1]
    assert "Traceback" not in found.stderr
    with pytest.raises(UserError, match=r"no dataset\.json"):
        TokenDataset.open(tmp_path / "w")
    subprocess.run(argv, check=True, capture_output=True)
    assert content(tmp_path / "w") == content(dataset.path)


def test_a_finished_dataset_is_not_made_again(prepare, corpora, tmp_path, capsys):
    prepare(corpora, tmp_path / "w")
    times = {p: p.stat().st_mtime_ns for p in (tmp_path / "w").glob("tokens-*")}
    capsys.readouterr()
    prepare(corpora, tmp_path / "w")
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "w").glob("tokens-*")} == times
    assert "documents" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"sequence_length": 30}, "sequence_length is 24 there, 30 here"),
        ({"held_out_fraction": 0.1}, "held_out_fraction is 0.2 there, 0.1 here"),
    ],
)
def test_a_workdir_of_another_dataset_is_refused(prepare, corpora, dataset, changes, named):
    with pytest.raises(UserError, match=named):
        prepare(corpora, dataset.path, **changes)


def test_changed_text_and_another_tokenizer_are_refused(
    prepare, corpora, texts, tmp_path, write_jsonl
):
    file = write_jsonl(tmp_path / "a.jsonl", texts)
    prepare(file, tmp_path / "w")
    other = tmp_path / "other.model"
    other.write_bytes(train_tokenizer(texts, 310).model_bytes)
    with pytest.raises(UserError, match="tokenizer_digest is "):
        prepare(file, tmp_path / "w", tokenizer=str(other))
    write_jsonl(tmp_path / "a.jsonl", [*texts[1:], texts[0]])
    with pytest.raises(UserError, match="fingerprint"):
        prepare(file, tmp_path / "w")


def test_a_tokenizer_is_trained_on_what_is_not_held_out(
    prepare, corpora, texts, tmp_path, tokenizer_of
):
    own = prepare(corpora, tmp_path / "w", tokenizer=None, vocab_size=300)
    expected = train_tokenizer(split_texts(texts, "train"), 300)
    pieces = {tokenizer_of(own).piece(i) for i in range(300)}
    assert pieces == {expected.piece(i) for i in range(300)}


def test_a_sample_is_no_larger_than_asked(prepare, corpora, tmp_path, capsys):
    """Seeded: the same seed takes the same sample."""
    settings = {"tokenizer": None, "vocab_size": 290, "tokenizer_sample_bytes": 3000}
    one = prepare(corpora, tmp_path / "1", seed=1, **settings)
    assert "pieces on 3," in capsys.readouterr().err
    again = prepare(corpora, tmp_path / "2", seed=1, **settings)
    other = prepare(corpora, tmp_path / "3", seed=2, **settings)
    assert one.tokenizer_digest == again.tokenizer_digest != other.tokenizer_digest


def test_the_report_names_what_was_left_out(prepare, write_jsonl, tmp_path, capsys):
    file = write_jsonl(tmp_path / "a.jsonl", ["one", "", "two", " "])
    with (tmp_path / "a.jsonl").open("ab") as added:
        added.write(b'{"text": "\xff"}\n')
    found = prepare(file, tmp_path / "w", held_out_fraction=0.0)
    out = capsys.readouterr().out
    assert f"2 empty ({file}:2, {file}:4)" in out
    assert f"1 not UTF-8 ({file}:5)" in out
    assert "2 documents" in out and "held_out     nothing" in out
    assert found.count("held_out") == 0
    with pytest.raises(UserError, match=f"{file}:5 is not UTF-8"):
        prepare(file, tmp_path / "v", bad_utf8="fail")


def test_all_that_was_left_out_is_kept_and_told_again(prepare, write_jsonl, tmp_path, capsys):
    folder = tmp_path / "text"
    folder.mkdir()
    write_jsonl(folder / "a.jsonl", ["one", None, "two"])
    (folder / "b.csv").write_text("x" * 99)
    (folder / "c.jsonl").symlink_to("nowhere")
    found = prepare(str(folder), tmp_path / "w", held_out_fraction=0.0)
    assert found.description["skipped"]["null_places"] == [f"{folder}/a.jsonl:2"]
    assert found.description["left_out"]["text"]["unknown"]["bytes"] == 99
    told = [
        f"  skipped      1 null ({folder}/a.jsonl:2)",
        "  WARNING: 33.3% of the documents are null",
        f"  left out     of text: 1 file of no known kind ({folder}/b.csv),"
        f" 1 dangling link ({folder}/c.jsonl)",
        "  WARNING: 67.8% of the bytes of text are of no known kind",
    ]
    assert capsys.readouterr().out.splitlines()[-4:] == told
    prepare(str(folder), tmp_path / "w", held_out_fraction=0.0)
    assert capsys.readouterr().out.splitlines()[-4:] == told


def test_a_dataset_that_does_not_know_what_was_left_out_is_reported(dataset):
    """As earlier versions wrote it."""
    description = dict(dataset.description)
    del description["left_out"]
    description["skipped"] = {
        "empty": 1, "empty_places": ["a.txt:1"], "bad_utf8": 0, "bad_utf8_places": [],
    }  # fmt: skip
    assert "skipped      1 empty (a.txt:1)" in report(TokenDataset(dataset.path, description))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"tokenizer": None}, "expected exactly one"),
        ({"vocab_size": 300}, "expected exactly one"),
        ({"sequence_length": 1}, "sequence_length is 1, expected at least 2"),
        ({"held_out_fraction": 1.0}, "held_out_fraction is 1.0"),
        ({"processes": 0}, "processes is 0"),
        ({"bad_utf8": "ignore"}, "bad_utf8 is 'ignore'"),
        ({"tokenizer": "none.model"}, "none.model does not exist"),
    ],
)
def test_bad_settings_leave_nothing_behind(prepare, corpora, tmp_path, changes, named):
    with pytest.raises(UserError, match=named):
        prepare(corpora, tmp_path / "w", **changes)
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize(
    ("lines", "fraction", "named"),
    [
        ([], 0.0, "no document"),
        (["", " "], 0.0, "0 are held out, 2 empty"),
        (["one"], 0.9999999, "1 are held out"),
    ],
)
def test_text_without_a_document_to_train_on_is_refused(
    prepare, write_jsonl, tmp_path, lines, fraction, named
):
    file = write_jsonl(tmp_path / "a.jsonl", lines)
    with pytest.raises(UserError, match=named):
        prepare(file, tmp_path / "w", held_out_fraction=fraction)
    assert not (tmp_path / "w" / "dataset.json").exists()


def test_a_tokenizer_with_one_mark_for_both_ends_is_refused(prepare, corpora, texts, tmp_path):
    """As conversions from other formats leave it, by an edit of the model's settings."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=model, model_type="bpe", vocab_size=60,
        bos_piece="<m1>", eos_piece="<m2>", minloglevel=2,
    )  # fmt: skip
    head, _, tail = model.getvalue().rpartition(b"<m1>")
    (tmp_path / "t.model").write_bytes(head + b"<m2>" + tail)
    with pytest.raises(UserError, match="one mark for begin and end"):
        prepare(corpora, tmp_path / "w", tokenizer=str(tmp_path / "t.model"))


def test_real_text_with_a_real_tokenizer(real_data, tmp_path, prepare, tokenizer_of):
    lines = (real_data / "corpora" / "zh_modern.jsonl").open(encoding="utf-8")
    (tmp_path / "zh.jsonl").write_text("".join(next(lines) for _ in range(60)), encoding="utf-8")
    model = str(real_data / "tokenizers" / "mistral_v1_32000.model")
    found = prepare(
        str(tmp_path / "zh.jsonl"), tmp_path / "w", tokenizer=model, sequence_length=256,
        held_out_fraction=0.0,
    )  # fmt: skip
    texts = [json.loads(line)["text"] for line in (tmp_path / "zh.jsonl").open(encoding="utf-8")]
    tokenizer = Tokenizer.open(model)
    assert [ids[1:-1].tolist() for _, ids in found.documents("train")] == [
        tokenizer.encode(text) for text in texts if text.strip()
    ]
