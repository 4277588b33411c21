"""Which files a corpus has: whatever lies in a folder is read, or named."""

import os
import socket
from typing import ClassVar

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from pangu_tiny.errors import UserError
from pangu_tiny.text.left_out import left_out_lines
from pangu_tiny.text.sources import find_sources, left_out_files

LINE = '{"text": "one"}\n'
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 9\n"


def write(file, content=LINE):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(content)
    return file


def found(text, folder):
    """Paths of the files, and of those that were left out by kind, both within a folder."""
    (source,) = find_sources(text)
    left_out = {}
    for kind, path, _ in source.left_out:
        left_out.setdefault(kind, []).append(os.path.relpath(path, folder))
    return [os.path.relpath(path, folder) for path, _ in source.files], left_out


@pytest.fixture
def corpus(tmp_path):
    """One of everything. The links sort before what they lead to."""
    folder = tmp_path / "corpus"
    for name in ("b.jsonl", "c.JSON.GZ", "d/e.Txt", "d/f.ndjson.zst"):
        write(folder / name)
    write(tmp_path / "elsewhere" / "g.parquet")
    write(tmp_path / "elsewhere" / "deep" / "h.jsonl")
    (folder / "a").symlink_to(tmp_path / "elsewhere")
    (folder / "a_again").symlink_to(tmp_path / "elsewhere" / "deep")
    (folder / "a_copy.jsonl").symlink_to("b.jsonl")
    (folder / "d" / "above").symlink_to("..")
    (folder / "gone.jsonl").symlink_to("nowhere.jsonl")
    (folder / "itself.jsonl").symlink_to("itself.jsonl")
    write(folder / "README.md~")
    write(folder / "t.csv")
    write(folder / ".hidden.jsonl")
    write(folder / ".git" / "x.txt")
    write(folder / "nothing.jsonl", "")
    write(folder / "run" / "identity.json")
    write(folder / "run" / "dataset.json")
    os.mkfifo(folder / "pipe.jsonl")
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(folder / "socket.txt"))
    return folder


FILES = ["a/deep/h.jsonl", "a/g.parquet", "b.jsonl", "c.JSON.GZ", "d/e.Txt", "d/f.ndjson.zst"]
LEFT_OUT = {
    "again": ["a_again", "a_copy.jsonl", "d/above"],
    "claimed": ["run"],
    "dangling": ["gone.jsonl", "itself.jsonl"],
    "empty": ["nothing.jsonl"],
    "hidden": [".git", ".hidden.jsonl"],
    "special": ["pipe.jsonl", "socket.txt"],
    "unknown": ["README.md~", "t.csv"],
}


def test_everything_in_a_folder_is_read_once_or_named(corpus):
    """That it ends says that the loop is not followed and the pipe not opened."""
    assert found(str(corpus), corpus) == (FILES, LEFT_OUT)
    (corpus / "d" / "up").symlink_to("../..")
    assert found(str(corpus / "d"), corpus)[1] == {"again": ["d/above", "d/up"]}


def test_a_glob_searches_the_folders_that_it_names(corpus):
    assert found(f"{corpus}/[a-d]*", corpus) == (FILES, {"again": LEFT_OUT["again"]})
    assert found(f"{corpus}/*/*.Txt", corpus) == (["d/e.Txt"], {})
    with pytest.raises(UserError, match="holds no documents"):
        find_sources(f"{corpus}/*/x.txt")  # as in a shell, .git is not meant
    assert found(f"{corpus}/.*.jsonl", corpus) == ([".hidden.jsonl"], {})
    assert found(f"{corpus}/d/", corpus)[0] == ["d/e.Txt", "d/f.ndjson.zst"]


def test_what_is_named_itself_is_read_or_refused(corpus):
    assert found(f"{corpus}/.hidden.jsonl", corpus) == ([".hidden.jsonl"], {})
    assert found(f"{corpus}/a_copy.jsonl", corpus) == (["a_copy.jsonl"], {})
    for name, told in (
        ("pipe.jsonl", r"1 named pipe, socket or device \(.*pipe\.jsonl\)"),
        ("nothing.jsonl", r"1 file of 0 bytes \(.*nothing\.jsonl\)"),
        ("t.csv", r"1 file of no known kind \(.*t\.csv\)"),
        ("run", r"1 folder that a stage wrote \(.*run\)"),
    ):
        with pytest.raises(UserError, match=f"text .*{name} holds no documents, but {told}"):
            find_sources(str(corpus / name))
    with pytest.raises(UserError, match=r"gone\.jsonl does not exist"):
        find_sources(str(corpus / "gone.jsonl"))


def test_the_report_names_the_first_of_each_kind(tmp_path):
    write(tmp_path / "c" / "a.txt", "x" * 99)
    for index in range(7):
        write(tmp_path / "c" / f"{index}.csv", "")
    (tmp_path / "c" / "link").symlink_to("nowhere")
    (line,) = left_out_lines(left_out_files(find_sources(str(tmp_path / "c"))))
    first = ", ".join(f"{tmp_path}/c/{index}.csv" for index in range(5))
    assert line == (
        f"  left out     of c: 7 files of no known kind ({first}, …),"
        f" 1 dangling link ({tmp_path}/c/link)"
    )


@pytest.mark.parametrize(("size", "warns"), [(1, False), (2, True)])
def test_much_of_no_known_kind_is_warned_of(tmp_path, size, warns):
    """A hundredth is not yet much."""
    write(tmp_path / "c" / "a.txt", "x" * 99)
    write(tmp_path / "c" / "a.pdf", "x" * size)
    lines = left_out_lines(left_out_files(find_sources(str(tmp_path / "c"))))
    warning = "  WARNING: 2.0% of the bytes of c are of no known kind"
    assert lines[1:] == ([warning] if warns else [])


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.jsonl.zst", "a.parquet"])
def test_a_pointer_of_git_lfs_is_no_text(tmp_path, name):
    write(tmp_path / "b.jsonl")
    write(tmp_path / name, POINTER)
    with pytest.raises(UserError, match=f"{name} is a git-lfs pointer.*git lfs pull"):
        find_sources(str(tmp_path))


def test_a_name_in_another_encoding_can_be_printed(tmp_path):
    for name in (b"\xc4\xe3.txt", b"\xc4\xe3.csv"):
        with open(os.path.join(os.fsencode(tmp_path), name), "w") as file:
            file.write("one")
    sources = find_sources({"a": str(tmp_path)})
    assert sources[0].fingerprint()
    assert r"\xc4\xe3.csv" in left_out_lines(left_out_files(sources))[0].encode().decode()


@pytest.fixture
def permissions(tmp_path, monkeypatch):
    """Permissions bind, as they do for nobody but root."""
    monkeypatch.chdir(tmp_path)  # nobody else may come here by its path
    root = os.geteuid() == 0
    if root:
        try:
            os.seteuid(65534)
        except PermissionError:
            pytest.skip("root without the capability to become another user")
    yield
    if root:
        os.seteuid(0)


@pytest.fixture
def forbidden(tmp_path):
    """Nobody may list `f`, enter `g`, or read what lies in `h`."""
    tmp_path.chmod(0o755)
    for folder, mode in (("f", 0o300), ("g", 0o400), ("h", 0o700)):
        write(tmp_path / folder / "a.jsonl", LINE * 100).chmod(0)
        write(tmp_path / folder / "b.jsonl", LINE)
        (tmp_path / folder).chmod(mode)
        os.chown(tmp_path / folder, 65534 if os.geteuid() == 0 else -1, -1)


@pytest.mark.parametrize(
    ("text", "named"),
    [("f", "f"), ("f/*.jsonl", "f"), ("g", "g/a.jsonl"), ("g/a.jsonl", "g/a.jsonl"),
     ("h", "h/a.jsonl"), ("h/a.jsonl", "h/a.jsonl"), ("?", "f")],
)  # fmt: skip
def test_what_may_not_be_read_is_an_error(forbidden, permissions, text, named):
    with pytest.raises(UserError, match=f"^{named} cannot be read: Permission denied$"):
        find_sources(text)[0].fingerprint()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_an_owner_needs_no_name(tmp_path):
    """In a container it often has none."""
    os.chown(write(tmp_path / "a.jsonl"), 2**20 + 7, -1)
    assert find_sources(str(tmp_path))[0].size == len(LINE)


class Bucket(MemoryFileSystem):
    """Objects in memory where epath looks for az://."""

    protocol = ("az",)
    store: ClassVar = {}
    pseudo_dirs: ClassVar = [""]

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.replace("az://", "memory://"))


def test_a_bucket_is_searched_as_a_folder_is():
    fsspec.register_implementation("az", Bucket, clobber=True)
    bucket = Bucket()
    for name in ("a.jsonl", "d/e.txt", "t.csv", ".h.txt"):
        bucket.pipe(f"az://b/c/{name}", LINE.encode())
    bucket.pipe("az://b/c/nothing.txt", b"")
    left_out = {"empty": ["nothing.txt"], "hidden": [".h.txt"], "unknown": ["t.csv"]}
    assert found("az://b/c", "az://b/c") == (["a.jsonl", "d/e.txt"], left_out)
    assert found("az://b/c/*.jsonl", "az://b/c") == (["a.jsonl"], {})
    assert found("az://b/*/d", "az://b/c") == (["d/e.txt"], {})
    with pytest.raises(UserError, match="az://b/none does not exist"):
        find_sources("az://b/none")
