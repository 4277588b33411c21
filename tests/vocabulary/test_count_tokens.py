"""count-tokens: every id of every training document, once, however the work was done."""

import itertools
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest

from pangu_tiny.errors import UserError
from pangu_tiny.text.documents import document_digest, held_out
from pangu_tiny.tokenizer.model import Tokenizer, train_tokenizer
from pangu_tiny.vocabulary import count_tokens as counting
from pangu_tiny.vocabulary.count_tokens import count_tokens
from pangu_tiny.vocabulary.counts import read_counts


@pytest.fixture(scope="session")
def count(tokenizer_file):
    def count(text, workdir, **changes):
        settings = {"tokenizer": tokenizer_file, "held_out_fraction": 0.2, "processes": 1} | changes
        count_tokens(str(workdir), text, **settings)
        return read_counts(str(workdir), Tokenizer.open(settings["tokenizer"] or tokenizer_file))

    return count


@pytest.fixture(scope="session")
def counts(count, corpora, tmp_path_factory):
    return count(corpora, tmp_path_factory.mktemp("counts") / "c")


def training(texts):
    return [text for text in texts if not held_out(text, 0.2)]


def counted(texts, tokenizer):
    return np.bincount(
        [i for text in texts for i in tokenizer.encode(text)], minlength=tokenizer.pieces
    )


def test_every_id_of_the_training_split_is_counted_by_source(counts, texts, tokenizer):
    for name, part in (("a", training(texts[:150])), ("b", training(texts[150:]))):
        entry = counts.sources[name]
        np.testing.assert_array_equal(counts.times_by_source[name], counted(part, tokenizer))
        assert entry["documents"] == len(part)
        assert entry["bytes"] == sum(len(text.encode()) for text in part)
        assert entry["tokens"] == counts.times_by_source[name].sum()
        assert (
            int(entry["digest"], 16)
            == sum(document_digest(text.encode()) for text in part) % 2**256
        )
    np.testing.assert_array_equal(counts.times, counted(training(texts), tokenizer))


def test_neither_units_nor_processes_nor_order_change_anything(
    counts, count, texts, tmp_path, write_jsonl
):
    shuffled = {
        "b": write_jsonl(tmp_path / "b.jsonl", texts[:149:-1]),
        "a": write_jsonl(tmp_path / "a.jsonl", texts[149::-1]),
    }
    other = count(shuffled, tmp_path / "w", unit_bytes=3000, processes=2)
    assert other.sources == counts.sources
    np.testing.assert_array_equal(other.times, counts.times)
    assert other.digest == counts.digest


def test_beam_counts_the_same(counts, count, corpora, dataset, tmp_path):
    pytest.importorskip("apache_beam")
    other = count(corpora, tmp_path / "t", runner="DirectRunner", unit_bytes=3000)
    assert other.sources == counts.sources
    np.testing.assert_array_equal(other.times, counts.times)
    count(corpora, tmp_path / "p", unit_bytes=3000)
    assert (tmp_path / "t" / "text.npz").read_bytes() == (tmp_path / "p" / "text.npz").read_bytes()
    rows = {"dataset": dataset.path, "tokenizer": None, "runner": "DirectRunner"}
    np.testing.assert_array_equal(count(None, tmp_path / "d", **rows).times, counts.times)
    with pytest.raises(UserError, match="runner 'NoRunner' with"):
        count(corpora, tmp_path / "n", runner="NoRunner")
    with pytest.raises(UserError, match="invalid int value: 'abc'"):
        options = ["--direct_num_workers=abc"]
        count(corpora, tmp_path / "o", runner="DirectRunner", runner_options=options)
    (tmp_path / "bad.jsonl").write_text('{"text": "one"}\n{"text": \n')
    with pytest.raises(UserError, match=r"bad\.jsonl:2 is not JSON"):
        count(str(tmp_path / "bad.jsonl"), tmp_path / "b", runner="DirectRunner")


def test_folders_of_counts_add_up(counts, count, corpora, tmp_path, tokenizer):
    folders = []
    for name, file in corpora.items():
        folders.append(str(tmp_path / name))
        count({name: file}, folders[-1])
    merged = read_counts(folders, tokenizer)
    assert merged.digest == counts.digest
    np.testing.assert_array_equal(merged.times, counts.times)
    with pytest.raises(UserError, match="was counted as 'a'"):
        read_counts([folders[0], folders[0]], tokenizer)


def test_a_dataset_counts_as_its_text_does(counts, count, dataset, tmp_path):
    other = count(None, tmp_path / "w", dataset=dataset.path, tokenizer=None, processes=2)
    for name, entry in counts.sources.items():
        np.testing.assert_array_equal(other.times_by_source[name], counts.times_by_source[name])
        for kind in ("documents", "bytes", "tokens", "normalised_bytes", "unknown_bytes"):
            assert other.sources[name][kind] == entry[kind]


@pytest.mark.pods
def test_killed_and_started_again_it_counts_the_same(counts, corpora, tokenizer_file, tmp_path):
    settings = {
        "text": corpora, "tokenizer": tokenizer_file, "held_out_fraction": 0.2, "processes": 2,
        "unit_bytes": 1500, "workdir": tmp_path / "w",
    }  # fmt: skip
    flags = [f"--gin.count_tokens.{name}={value}" for name, value in settings.items()]
    kills = 0
    for wanted in itertools.count(1):
        process = subprocess.Popen(
            [sys.executable, "-m", "pangu_tiny", "count-tokens", *flags], stderr=subprocess.DEVNULL
        )
        while process.poll() is None:
            if kills < 2 and len(list((tmp_path / "w" / "units").glob("*.npz"))) >= 3 * wanted:
                process.kill()
                kills += process.wait() == -9
        if not process.returncode:
            break
    assert kills
    again = read_counts(str(tmp_path / "w"), Tokenizer.open(tokenizer_file))
    assert again.sources == counts.sources
    np.testing.assert_array_equal(again.times, counts.times)


def test_wrong_arguments_are_named(count, counts, corpora, dataset, texts, tmp_path, write_jsonl):
    with pytest.raises(UserError, match="expected text and tokenizer, or a dataset alone"):
        count(corpora, tmp_path / "w", dataset=dataset.path)
    with pytest.raises(UserError, match="expected text and tokenizer, or a dataset alone"):
        count(corpora, tmp_path / "w", tokenizer=None)
    with pytest.raises(UserError, match=r"held_out_fraction is 1, expected"):
        count(corpora, tmp_path / "w", held_out_fraction=1)
    with pytest.raises(UserError, match=r"unit_bytes is 5, expected at least 1,024"):
        count(corpora, tmp_path / "w", unit_bytes=5)
    with pytest.raises(UserError, match="runner_options are those of a runner"):
        count(corpora, tmp_path / "w", runner_options=["--x=1"])
    (tmp_path / "t.model").write_bytes(b"no model")
    with pytest.raises(UserError, match="is not a SentencePiece model"):
        count(corpora, tmp_path / "w", tokenizer=str(tmp_path / "t.model"))
    assert not (tmp_path / "w").exists()
    with pytest.raises(UserError, match=r"no document to count: 2 empty, 0 null, 0 not"):
        count(write_jsonl(tmp_path / "e.jsonl", [" ", ""]), tmp_path / "e")
    with pytest.raises(UserError, match=r"has no counts\.json"):
        read_counts(str(tmp_path / "e"), train_tokenizer(texts, 290))


def test_damaged_counts_are_named(count, corpora, tokenizer, tmp_path, monkeypatch):
    folder = tmp_path / "w"
    count(corpora, folder)
    for file, content, said in (
        ("counts.npy", (folder / "counts.npy").read_bytes()[:-8], r"counts\.npy cannot be read"),
        ("counts.json", b"", r"counts\.json is damaged: it is empty"),
        ("counts.json", b'{"a": 1}', r"counts\.json is damaged: it has no 'tokenizer_digest'"),
    ):
        whole = (folder / file).read_bytes()
        (folder / file).write_bytes(content)
        with pytest.raises(UserError, match=said):
            read_counts(str(folder), tokenizer)
        (folder / file).write_bytes(whole)
    np.save(folder / "counts.npy", np.ones((1, 300), np.int64))
    with pytest.raises(UserError, match=r"holds \[1, 300\] counts, expected \[2, 300\]"):
        read_counts(str(folder), tokenizer)
    with monkeypatch.context() as patch:
        patch.setattr(counting, "write_counts", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            count(corpora, tmp_path / "v")
    (tmp_path / "v" / "units" / "00000.npz").write_bytes(b"")
    with pytest.raises(UserError, match=r"00000\.npz cannot be read: .*; remove it"):
        count(corpora, tmp_path / "v")


def test_a_dataset_changed_in_place_is_counted_anew(count, prepare, write_jsonl, texts, tmp_path):
    found = []
    for part in (texts[:50], texts[50:100]):
        shutil.rmtree(tmp_path / "data", ignore_errors=True)
        prepare(write_jsonl(tmp_path / "t.jsonl", part), tmp_path / "data")
        settings = {"dataset": str(tmp_path / "data"), "tokenizer": None}
        found.append(count(None, tmp_path / str(len(found)), **settings).times)
    assert (found[0] != found[1]).any()
    counts = json.loads((tmp_path / "0" / "counts.json").read_text())
    assert counts["held_out_fraction"] == 0.2


def test_counts_of_another_tokenizer_are_refused(count, corpora, texts, tmp_path):
    count(corpora, tmp_path / "w")
    with pytest.raises(UserError, match="are of the tokenizer"):
        read_counts(str(tmp_path / "w"), train_tokenizer(texts, 290))


def test_what_was_left_out_is_told_as_prepare_data_tells_it(
    count, prepare, write_jsonl, tmp_path, capsys
):
    folder = tmp_path / "text"
    folder.mkdir()
    write_jsonl(folder / "a.jsonl", [*["one", "", None] * 9, *[f"{n} words" for n in range(99)]])
    (folder / "b.txt").write_bytes("世界".encode("gb18030") * 999)
    (folder / "c.csv").write_text("x" * 99)
    reports = []
    for stage, workdir in ((prepare, "p"), (count, "c")):
        settings = {"processes": 2, "unit_bytes": 1024} if stage is count else {}
        stage(str(folder), tmp_path / workdir, held_out_fraction=0.0, **settings)
        reports.append(capsys.readouterr().out.splitlines()[-7:])
    assert reports[0] == reports[1]
    places = [f"{folder}/a.jsonl:{line}" for line in (2, 5, 8, 11, 14)]
    assert reports[1][0] == f"  skipped      9 empty ({', '.join(places)}, …)"
    assert reports[1][2] == f"  skipped      1 not UTF-8 ({folder}/b.txt:1)"
    assert "WARNING: 83.2% of the bytes and 0.9% of the documents are not UTF-8" in reports[1][3]
    entry = json.loads((tmp_path / "c" / "counts.json").read_text())["sources"]["text"]
    assert entry["skipped"]["bad_utf8_bytes"] == 3996
    assert entry["left_out"]["unknown"]["first"] == [f"{folder}/c.csv"]


def test_nothing_but_what_is_skipped_is_told_too(count, write_jsonl, tmp_path, capsys):
    text = {"a": write_jsonl(tmp_path / "a.jsonl", ["one"] * 9), "b": str(tmp_path / "b.txt")}
    (tmp_path / "b.txt").write_bytes("世界".encode("gb18030"))
    count(text, tmp_path / "w", held_out_fraction=0)
    assert "100.0% of the bytes" in capsys.readouterr().out


def test_a_foreign_language_is_warned_of(count, tmp_path, write_jsonl, capsys):
    count(
        write_jsonl(tmp_path / "ru.jsonl", [f"Привет, мир {i}" for i in range(9)]), tmp_path / "w"
    )
    assert "WARNING: 88.64% of the text of ru is unknown to the" in capsys.readouterr().out


def test_a_real_tokenizer_counts_real_text(count, real_data, tmp_path):
    lines = (real_data / "corpora" / "zh_modern.jsonl").open(encoding="utf-8")
    (tmp_path / "zh.jsonl").write_text("".join(next(lines) for _ in range(60)), encoding="utf-8")
    model = str(real_data / "tokenizers" / "internlm_v7_sft.model")
    found = count(str(tmp_path / "zh.jsonl"), tmp_path / "w", tokenizer=model)
    texts = [json.loads(line)["text"] for line in (tmp_path / "zh.jsonl").open(encoding="utf-8")]
    np.testing.assert_array_equal(found.times, counted(training(texts), Tokenizer.open(model)))
