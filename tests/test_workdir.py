"""The folder of a stage: claimed once, refused to others, written whole or not at all."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from etils import epath

from pangu_tiny import workdir
from pangu_tiny.errors import UserError
from pangu_tiny.workdir import (
    claim,
    digest_of,
    environment,
    finished,
    read_identity,
    read_json,
    running,
    write_atomically,
)

IDENTITY = {"model": {"depth": 2, "width": 8}, "seed": 0, "files": ("a", "b")}


def test_a_claimed_folder_is_claimed_again_by_the_same_run(tmp_path):
    folder = claim(tmp_path / "deep" / "w", "train", IDENTITY)
    (folder / "result").write_text("kept")
    assert claim(tmp_path / "deep" / "w", "train", IDENTITY) == folder
    assert (folder / "result").read_text() == "kept"
    found = {"stage": "train", **IDENTITY, "files": ["a", "b"]}
    assert read_identity(folder) == found
    assert read_identity(tmp_path) is None


def test_a_folder_that_was_not_finished_says_who_made_it(tmp_path):
    with pytest.raises(UserError, match=r"scores .*w has no s\.npz, expected a folder that score-"):
        finished("scores", tmp_path / "w", "score-batches", "s.npz")
    folder = claim(tmp_path / "w", "train", IDENTITY)
    with pytest.raises(UserError, match=r"has no s\.npz and was made by train, expected"):
        finished("scores", folder, "score-batches", "s.npz")
    (folder / "s.npz").write_bytes(b"")
    assert finished("scores", folder, "score-batches", "s.npz") == folder / "s.npz"


def test_digests_follow_from_facts_and_arrays():
    facts, array = {"b": 1, "a": [None]}, np.arange(6).reshape(2, 3)
    whole = digest_of(facts, array)
    assert whole == digest_of({"a": [None], "b": 1}, array.T.copy().T) and len(whole) == 64
    assert len({whole, digest_of(facts), digest_of(facts, array + 1), digest_of({}, array)}) == 4


def test_another_configuration_is_refused_by_the_values_that_differ(tmp_path):
    claim(tmp_path / "w", "train", IDENTITY)
    other = {"model": {"depth": 3, "width": 8, "heads": 1}, "seed": 0, "files": ("a", "b")}
    with pytest.raises(UserError) as refusal:
        claim(tmp_path / "w", "train", other)
    assert str(refusal.value) == (
        f"workdir {tmp_path / 'w'} holds another run: "
        "model.depth is 2 there, 3 here; model.heads is None there, 1 here"
    )
    assert read_identity(tmp_path / "w")["model"] == IDENTITY["model"]
    with pytest.raises(UserError, match="was made by train, expected a folder of evaluate"):
        claim(tmp_path / "w", "evaluate", IDENTITY)


def test_foreign_folders_and_files_are_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="is not empty and was not made by train"):
        claim(tmp_path, "train", IDENTITY)
    assert os.listdir(tmp_path) == ["notes.txt"]
    with pytest.raises(UserError, match="is a file, expected a folder"):
        claim(tmp_path / "notes.txt", "train", IDENTITY)


def test_an_empty_folder_is_taken(tmp_path):
    assert claim(tmp_path, "train", IDENTITY) == epath.Path(tmp_path)


def test_a_folder_is_absolute_and_a_url_stays(tmp_path, monkeypatch):
    """Orbax refuses relative paths, after a run has gone all the way to its first checkpoint."""
    monkeypatch.chdir(tmp_path)
    assert claim("runs/a", "train", IDENTITY) == epath.Path(tmp_path / "runs" / "a")
    pytest.importorskip("gcsfs", reason="needs the extra `gcs`")
    assert str(workdir.absolute("gs://bucket/a")) == "gs://bucket/a"


def test_a_url_that_nothing_installed_reads_is_refused(monkeypatch):
    """In one line, before epath ends in a stack trace."""
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(UserError, match=r"^s3://b/a cannot be opened: .*s3fs.*pangu_tiny\[gcs\]"):
        claim("s3://b/a", "train", IDENTITY)
    with pytest.raises(UserError, match=r"^gz://b/a cannot be opened: Protocol not known: gz"):
        claim("gz://b/a", "train", IDENTITY)


def test_a_kill_while_claiming_does_not_lock_the_folder(tmp_path, monkeypatch):
    """All that such a kill leaves is the temporary file."""
    with monkeypatch.context() as patch:
        path = type(epath.Path(tmp_path))
        patch.setattr(path, "replace", lambda *_: 1 / 0)
        patch.setattr(path, "unlink", lambda *_, **__: None)  # who is killed cleans up nothing
        with pytest.raises(ZeroDivisionError):
            claim(tmp_path, "train", IDENTITY)
    assert [name for name in os.listdir(tmp_path) if name.endswith(".tmp")]
    assert claim(tmp_path, "train", IDENTITY)


def test_writes_are_whole_or_not_at_all(tmp_path, monkeypatch):
    file = epath.Path(tmp_path) / "a.json"
    write_atomically(file, "old")
    assert os.listdir(tmp_path) == ["a.json"]
    with monkeypatch.context() as patch:
        patch.setattr(type(file), "replace", lambda *_: 1 / 0)  # killed before the last act
        with pytest.raises(ZeroDivisionError):
            write_atomically(file, "new")
    assert file.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.json"], "what failed leaves its temporary file"
    write_atomically(file, b"\x00bytes")
    assert file.read_bytes() == b"\x00bytes"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty"),
        (b" \n", "is empty"),
        (b"\0" * 64, "is not JSON: "),
        (b'{"a": 1', "is not JSON: "),
        (b'{"a": "\xff"}', "is not JSON: "),
        (b"[" * 100_000, "is not JSON: "),
        (b"[1]", "holds a list"),
        (b"null", "holds a NoneType"),
        (b"{}", "has no 'a'"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, content, said):
    """As a power failure or a full disk leave it."""
    file = epath.Path(tmp_path) / "identity.json"
    file.write_text('{"a": 1}')
    assert read_json(file, "a") == {"a": 1}
    file.write_bytes(content)
    with pytest.raises(UserError, match=rf"identity\.json is damaged: it {said}"):
        read_json(file, "a")
    if content != b"{}":
        with pytest.raises(UserError, match=r"identity\.json is damaged: "):
            claim(tmp_path, "train", IDENTITY)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match=r"a\.json cannot be read: "):
        read_json(epath.Path(tmp_path) / "a.json")


def test_config_and_environment_lie_beside_the_result(tmp_path):
    with running("train.steps = 3\n"):
        claim(tmp_path / "w", "train", IDENTITY)
    assert (tmp_path / "w" / "config.gin").read_text() == "train.steps = 3\n"
    left = json.loads((tmp_path / "w" / "environment.json").read_text())
    assert left == environment() and "jax" in left["versions"]
    claim(tmp_path / "v", "train", IDENTITY)
    assert not (tmp_path / "v" / "config.gin").exists(), "the text of one run ends with it"


def test_environment_without_git(monkeypatch):
    """A machine with nothing but Python has no git."""
    monkeypatch.setenv("PATH", "")
    assert environment()["commit"] is None


def test_the_commit_is_that_of_this_code_not_of_a_checkout_around_it(tmp_path, monkeypatch):
    def git(*command):
        author = ["-c", "user.name=a", "-c", "user.email=a@b"]
        command = ["git", *author, "-C", str(tmp_path), *command]
        return subprocess.check_output(command, text=True).strip()

    module = tmp_path / "site-packages" / "workdir.py"
    module.parent.mkdir()
    module.touch()
    monkeypatch.setattr(workdir, "__file__", str(module))
    git("init", "--quiet")
    git("commit", "--quiet", "--allow-empty", "--message=a")
    assert environment()["commit"] is None
    git("add", ".")
    assert environment()["commit"] == git("rev-parse", "HEAD")


HOLD = """
import sys
from pangu_tiny.workdir import claim
claim(sys.argv[1], "train", {"seed": 0})
print("claimed", flush=True)
sys.stdin.read()
"""


def test_a_folder_that_is_being_written_is_refused_until_its_process_is_gone(tmp_path):
    """However it goes: by SIGKILL here."""
    argv = [sys.executable, "-c", HOLD, str(tmp_path / "w")]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"claimed\n"
        with pytest.raises(UserError, match=rf"being written by process {other.pid} on .*: wait"):
            claim(tmp_path / "w", "train", {"seed": 0})
        other.kill()
    claim(tmp_path / "w", "train", {"seed": 0})
    claim(tmp_path / "w", "train", {"seed": 0})  # this process has it already


def test_a_folder_is_free_again_behind_the_run_of_its_stage(tmp_path):
    with running(""):
        claim(tmp_path / "w", "train", {"seed": 0})
    argv = [sys.executable, "-c", HOLD, str(tmp_path / "w")]
    found = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, check=False)
    assert found.returncode == 0, found.stderr


def test_a_lock_on_a_network_never_stands_in_the_way(tmp_path, monkeypatch, capsys):
    """There a machine that was lost may hold it still."""
    monkeypatch.setattr(workdir, "_on_network", lambda _: True)
    argv = [sys.executable, "-c", HOLD, str(tmp_path / "w")]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"claimed\n"
        claim(tmp_path / "w", "train", {"seed": 0})
        other.kill()
    assert f"WARNING: workdir {tmp_path / 'w'} is being written by" in capsys.readouterr().err


def test_a_value_that_differs_may_come_with_advice(tmp_path):
    claim(tmp_path, "train", {"steps": 20, "seed": 0})
    advice = {"steps": "to train on, give another folder", "seed": "never said"}
    with pytest.raises(UserError) as refusal:
        claim(tmp_path, "train", {"steps": 40, "seed": 0}, advice)
    assert str(refusal.value).endswith(
        "steps is 20 there, 40 here; to train on, give another folder"
    )
