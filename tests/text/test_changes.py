"""Text that has changed is noticed, wherever the change is; text that has not is not read again."""

import json
import os
import shutil

import pyarrow
import pyarrow.parquet
import pytest

from pangu_tiny.data import shards
from pangu_tiny.data.prepare_data import prepare_data
from pangu_tiny.errors import UserError
from pangu_tiny.text import changes
from pangu_tiny.text.changes import Reader, Reading
from pangu_tiny.text.documents import split_units
from pangu_tiny.text.sources import find_sources
from pangu_tiny.vocabulary.count_tokens import TextJob, count_tokens

MIDDLE = 2000  # a line that lies in neither the first nor the last 64 KiB
LINES = [{"text": f"the cat {i:05} sat away, ran and sat"} for i in range(2 * MIDDLE)]
WHOLE = 2**20  # one unit


def write(file, lines=LINES):
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def edit(file, line=MIDDLE, new="dog"):
    """Another word of the same length, a moment after the file was last written."""
    before = file.stat().st_mtime_ns
    content = file.read_bytes()
    place = content.index(b"%05d" % line) - len(b"cat ")
    file.write_bytes(content[:place] + new.encode() + content[place + 3 :])
    os.utime(file, ns=(before + 1000, before + 1000))
    assert file.stat().st_size == len(content)


def touch(file):
    os.utime(file, ns=(file.stat().st_mtime_ns + 1000,) * 2)


@pytest.fixture
def file(tmp_path):
    return write(tmp_path / "cats.jsonl")


@pytest.fixture(params=["count-tokens", "prepare-data"])
def stage(request, tokenizer_file):
    """Runs a stage over some text; `stage.job` is the class of its jobs."""

    def count(text, workdir, size=WHOLE):
        return count_tokens(
            str(workdir), text, tokenizer_file, held_out_fraction=0.2, processes=1, unit_bytes=size
        )

    def prepare(text, workdir, size=WHOLE):
        return prepare_data(
            text, str(workdir), 24, tokenizer_file, held_out_fraction=0.2, processes=1,
            shard_bytes=size,
        )  # fmt: skip

    run = count if request.param == "count-tokens" else prepare
    run.job = TextJob if request.param == "count-tokens" else shards.TextJob
    return run


@pytest.fixture
def reads(monkeypatch):
    """The files that are read, in order."""
    found = []
    read = changes.read_documents

    def watch(unit, *rest):
        found.extend(part.path for part in unit.parts)
        return read(unit, *rest)

    monkeypatch.setattr(changes, "read_documents", watch)
    return found


def test_an_edit_in_the_middle_is_refused(stage, file, tmp_path, capsys):
    stage(str(file), tmp_path / "w")
    edit(file)
    for _ in range(2):
        with pytest.raises(UserError, match=r"cats\.jsonl has changed since it was read for .*/w"):
            stage(str(file), tmp_path / "w")
        assert f"is another copy ({file}); comparing it whole" in capsys.readouterr().out
    edit(file, new="cat")
    stage(str(file), tmp_path / "w")
    assert "it is the same text" in capsys.readouterr().out


def test_an_older_file_in_its_place_is_refused(stage, file, tmp_path):
    """As a backup that is put back has its own time."""
    stage(str(file), tmp_path / "w")
    edit(file)
    os.utime(file, ns=(10**18, 10**18))
    with pytest.raises(UserError, match="has changed since"):
        stage(str(file), tmp_path / "w")


def test_only_what_was_touched_is_read_again_and_only_once(stage, file, tmp_path, reads, capsys):
    other = write(tmp_path / "other.jsonl", LINES[:9])
    text = {"a": str(file), "b": str(other)}
    whole = stage(text, tmp_path / "w", size=2**16)
    reads.clear()
    assert stage(text, tmp_path / "w", size=2**16) == whole
    assert not reads
    touch(file)
    capsys.readouterr()
    assert stage(text, tmp_path / "w", size=2**16) == whole
    assert set(reads) == {str(file)}
    assert "it is the same text" in capsys.readouterr().out
    reads.clear()
    assert stage(text, tmp_path / "w", size=2**16) == whole
    assert not reads


def test_a_copy_elsewhere_is_the_same_text(stage, file, tmp_path, reads):
    whole = stage({"a": str(file)}, tmp_path / "w")
    copies = [tmp_path / "copy.jsonl", tmp_path / "kept.jsonl"]
    shutil.copyfile(file, copies[0])
    touch(copies[0])
    shutil.copy2(file, copies[1])  # with its time
    for copy, times in zip(copies, (1, 1), strict=True):
        reads.clear()
        assert stage({"a": str(copy)}, tmp_path / "w") == whole
        assert reads == [str(copy)] * times


def interrupt(stage, monkeypatch, text, workdir, after, then=lambda: None):
    """Runs a stage until so many jobs are done."""
    done, run = [], stage.job.run

    def stop(self, tokenizer):
        if len(done) == after:
            raise KeyboardInterrupt
        run(self, tokenizer)
        done.append(self)

    with monkeypatch.context() as patch:
        patch.setattr(stage.job, "run", stop)
        with pytest.raises(KeyboardInterrupt):
            stage(text, workdir, size=2**16)


def test_an_edit_of_what_an_interrupted_run_has_read_is_refused(
    stage, file, tmp_path, monkeypatch, reads
):
    """At once, before anything more is read."""
    interrupt(stage, monkeypatch, str(file), tmp_path / "w", after=2)
    edit(file)
    reads.clear()
    with pytest.raises(UserError, match=r"cats\.jsonl has changed since"):
        stage(str(file), tmp_path / "w", size=2**16)
    assert len(reads) == 2


def test_an_edit_of_what_it_has_not_read_is_not(stage, file, tmp_path, monkeypatch, reads):
    """What it has read is compared once, not again at the end."""
    interrupt(stage, monkeypatch, str(file), tmp_path / "w", after=1)
    edit(file)
    reads.clear()
    found = stage(str(file), tmp_path / "w", size=2**16)
    units = len(split_units(find_sources(str(file)), 2**16))
    assert len(reads) == 1 + units - 1 > 2
    assert found == stage(str(file), tmp_path / "new", size=2**16)
    reads.clear()
    stage(str(file), tmp_path / "w", size=2**16)
    assert not reads


def test_an_edit_between_two_units_is_noticed(stage, file, tmp_path, monkeypatch):
    run = stage.job.run

    def run_and_edit(self, tokenizer):
        run(self, tokenizer)
        if self.index == 2:
            edit(file)

    monkeypatch.setattr(stage.job, "run", run_and_edit)
    with pytest.raises(UserError, match=r"cats\.jsonl has changed since"):
        stage(str(file), tmp_path / "w", size=2**16)
    assert not (tmp_path / "w" / "text.npz").exists()


@pytest.mark.parametrize(("line", "refused"), [(MIDDLE - 1, True), (2 * MIDDLE - 1, False)])
def test_an_edit_while_a_unit_is_read_is_noticed(stage, file, tmp_path, monkeypatch, line, refused):
    """What was read before the edit is no text of now; what is read after it, is."""
    read = changes.read_documents

    def read_and_edit(unit, *rest):
        for number, text in enumerate(read(unit, *rest)):
            yield text
            if number == MIDDLE + 500 and b"dog" not in file.read_bytes():
                edit(file, line)

    with monkeypatch.context() as patch:
        patch.setattr(changes, "read_documents", read_and_edit)
        if refused:
            with pytest.raises(UserError, match=r"cats\.jsonl has changed since"):
                stage(str(file), tmp_path / "w")
            return
        found = stage(str(file), tmp_path / "w")
    assert found == stage(str(file), tmp_path / "new")


def test_a_torn_record_is_named(stage, file, tmp_path, monkeypatch):
    interrupt(stage, monkeypatch, str(file), tmp_path / "w", after=1)
    record = tmp_path / "w" / "units" / "00000.text.json"
    record.write_text("")
    with pytest.raises(UserError, match=r"00000\.text\.json is damaged: it is empty"):
        stage(str(file), tmp_path / "w", size=2**16)
    record.unlink()
    with pytest.raises(UserError, match=r"00000\.text\.json is missing: .* choose another workdir"):
        stage(str(file), tmp_path / "w", size=2**16)


def test_a_folder_of_an_earlier_version_is_said_not_to_know(stage, file, tmp_path, capsys):
    stage(str(file), tmp_path / "w")
    assert "earlier version" not in capsys.readouterr().out
    (tmp_path / "w" / "text.npz").unlink()
    stage(str(file), tmp_path / "w")
    assert "whether that has changed since is not known" in capsys.readouterr().out


def test_a_dataset_that_is_counted_has_no_text(dataset, tmp_path):
    for _ in range(2):
        count_tokens(str(tmp_path / "w"), dataset=dataset.path, processes=1)
    assert not (tmp_path / "w" / "text.npz").exists()


def test_an_edit_of_what_a_tokenizer_was_trained_on_is_refused(file, tmp_path, monkeypatch):
    """Though no unit has been read when the run is interrupted."""

    def prepare():
        prepare_data(str(file), str(tmp_path / "w"), 24, vocab_size=290, processes=1)

    with monkeypatch.context() as patch:
        patch.setattr(shards.TextJob, "run", lambda *_: 1 / 0)
        for _ in range(2):
            with pytest.raises(ZeroDivisionError):
                prepare()
    edit(file)
    with pytest.raises(UserError, match=r"text has changed since .*/tokenizer\.model was trained"):
        prepare()
    edit(file, new="cat")
    prepare()


def test_row_groups_are_compared(stage, tmp_path):
    """Both groups of one file; its footer, at the end, stays as it is."""
    file = tmp_path / "cats.parquet"
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist(LINES), file, row_group_size=MIDDLE + 500, compression="none",
        use_dictionary=False, write_statistics=False,
    )  # fmt: skip
    stage(str(file), tmp_path / "w")
    touch(file)
    stage(str(file), tmp_path / "w")
    edit(file)
    with pytest.raises(UserError, match=r"cats\.parquet has changed since"):
        stage(str(file), tmp_path / "w")


def records(file, **settings):
    units = split_units(find_sources(str(file)), **settings)
    readers = [Reader(unit, Reading("text", "skip")) for unit in units]
    for reader in readers:
        assert len(list(reader)) >= 0
    return [record.digest for reader in readers for record in reader.records]


@pytest.mark.parametrize(
    ("other", "same"),
    [
        (['{"text":"a"}', '{"text": "b", "id": 7}', '{"text": ""}', '{"text": null}'], True),
        (['{"text": "b"}', '{"text": "a"}', '{"text": ""}', '{"text": null}'], False),
        (['{"text": "a"}', '{"text": "b"}', '{"text": ""}', '{"text": ""}'], False),
        (['{"text": "a"}', '{"text": ""}', '{"text": "b"}', '{"text": null}'], False),
        (['{"text": "ab"}', '{"text": ""}', '{"text": null}'], False),
    ],
)
def test_the_digest_is_of_documents_their_order_and_what_was_skipped(tmp_path, other, same):
    """Not of the name of the file, or of what stands beside the text."""
    lines = ['{"text": "a"}', '{"text": "b"}', '{"text": ""}', '{"text": null}']
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    (tmp_path / "b.jsonl").write_text("\n".join(other))
    assert (records(tmp_path / "a.jsonl") == records(tmp_path / "b.jsonl")) == same
