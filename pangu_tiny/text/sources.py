"""The files of each corpus, and those beside them that are left out.

A folder is searched to its bottom, and so is every folder that a glob names. Links are followed;
what they find that is found anyway, such as a folder above them, is read once, under its own name.
Left out, counted and named are

    files of no known kind             by their suffix (`formats.KINDS`)
    files of 0 bytes
    hidden files and folders           whose name begins with a dot, unless `text` names them
    dangling links
    named pipes, sockets and devices   which are never opened
    what a link finds again
    folders that a stage wrote         which hold .json files, but no text

What may not be read is an error, and so is the pointer that a clone without git-lfs has in place of
a file.
"""

import collections
import dataclasses
import errno
import fnmatch
import hashlib
import os
import pathlib
import stat
from typing import Any, NoReturn

from etils import epath

from pangu_tiny.errors import UserError
from pangu_tiny.git_lfs import check_no_pointer
from pangu_tiny.text.formats import (
    KINDS,
    TFDS,
    kind_of,
    printable,
    reading,
    stem,
    tfds_name,
    tfds_source,
    unreadable,
)
from pangu_tiny.text.left_out import describe_files, files_by_kind

Text = str | list[str] | dict[str, str | list[str]]

_POINTER_BYTES = 1024  # git-lfs's own limit
_CLAIMED = "identity.json"  # what `workdir.claim` leaves in a folder


@dataclasses.dataclass(frozen=True)
class Source:
    """A named corpus: its files, with their sizes in bytes, and (kind, path, bytes) of what was
    left out."""

    name: str
    files: tuple[tuple[str, int], ...]
    left_out: tuple[tuple[str, str, int], ...] = ()

    @property
    def size(self) -> int:
        return sum(size for _, size in self.files)

    def fingerprint(self) -> str:
        """A digest of the size, first and last 64 KiB of every file, not of paths."""
        digest = hashlib.sha256()
        for path, size in self.files:
            digest.update(f"{size}\n".encode())
            if path.startswith(TFDS):
                info = tfds_source(path).dataset_info
                digest.update(f"{info.full_name} {len(tfds_source(path))}".encode())
                continue
            with reading(path), epath.Path(path).open("rb") as file:
                digest.update(file.read(2**16))
                file.seek(max(0, size - 2**16))
                digest.update(file.read())
        return digest.hexdigest()

    def identity(self) -> dict[str, Any]:
        """What `workdir.claim` compares."""
        return {
            "name": self.name,
            "files": len(self.files),
            "bytes": self.size,
            "fingerprint": self.fingerprint(),
        }


def find_sources(text: Text) -> list[Source]:
    """Finds the files of a `text` argument.

    Args:
      text: a file, folder, glob or tfds: name; a list of them, each a source named after its stem
        or folder; or a dict from source name to one or several of them.
    """
    if isinstance(text, dict):
        named = list(text.items())
    else:
        items = [text] if isinstance(text, str) else list(text)
        named = [(_source_name(item), item) for item in items]
    if not named:
        raise UserError("text names nothing, expected a file, folder, glob or tfds:NAME")
    names = [name for name, _ in named]
    for name in names:
        if names.count(name) > 1:
            raise UserError(
                f"text has two sources named {name!r}; give a dict from source name to path"
            )
    return [_find_source(name, [s] if isinstance(s, str) else s) for name, s in named]


def left_out_files(sources: list[Source]) -> dict[str, dict[str, Any]]:
    """What was left out of each source, by its name, as dataset.json and counts.json hold it."""
    return {source.name: files_by_kind(source.left_out, source.size) for source in sources}


def _source_name(item: str) -> str:
    if item.startswith(TFDS):
        return os.path.basename(tfds_name(item)[0].rstrip("/"))
    fixed = [name for name in item.rstrip("/").split("/") if not _is_glob(name)]
    return printable(stem(fixed[-1]) if fixed and stem(fixed[-1]) else item)


def _find_source(name: str, items: list[str]) -> Source:
    files: list[tuple[str, int]] = []
    left_out: list[tuple[str, str, int]] = []
    for item in items:
        if item.startswith(TFDS):
            source = tfds_source(item)
            size = source.dataset_info.splits[source.split].num_bytes
            files.append((item, max(size, len(source))))
            continue
        found, rest = _search(item)
        if not found:
            but = f", but {describe_files(files_by_kind(rest, 0))}" if rest else ""
            raise UserError(f"text {item} holds no documents{but}, expected {KINDS}")
        files += found
        left_out += rest
    return Source(name, tuple(files), tuple(left_out))


def _named_paths(item: str) -> list[epath.Path]:
    path = epath.Path(item)
    if _look(path)[0] != "dangling":
        return [path]
    if not _is_glob(item):
        raise UserError(f"text {item} does not exist, expected a file, folder, glob or tfds:NAME")
    if "**" in item:
        raise UserError(f"text {item}: ** is not known; a folder is searched to its bottom")
    names = item.rstrip("/").split("/")
    first = next(i for i, name in enumerate(names) if _is_glob(name))
    paths = [epath.Path("/".join(names[:first]) or ("/" if item.startswith("/") else "."))]
    for pattern in names[first:]:
        paths = [
            path / name
            for path in paths
            if _look(path)[0] == "folder"
            for name in _list(path)
            if fnmatch.fnmatchcase(name, pattern) and (name[0] != "." or pattern[0] == ".")
        ]
    return paths


def _is_glob(path: str) -> bool:
    return any(c in path for c in "*?[")


def _search(item: str) -> tuple[list[tuple[str, int]], list[tuple[str, str, int]]]:
    """The (path, bytes) of files in the order of their paths, and what is left out.

    Links wait until all else is found, so that what they find again keeps its own name. What lies
    above the item counts as found: a link that leads there leads back.
    """
    files, left_out = [], []
    waiting: collections.deque[tuple[epath.Path, str]] = collections.deque()
    links: collections.deque[tuple[epath.Path, str]] = collections.deque()
    for path in _named_paths(item):
        (links if _is_link(path) else waiting).append((path, _real(path)))
    found = {os.fspath(folder) for folder in pathlib.PurePath(_real(epath.Path(item))).parents}
    while waiting or links:
        path, real = (waiting or links).popleft()
        kind, size = _look(path)
        if kind in ("folder", "file"):
            kind = "again" if real in found else kind
            found.add(real)
        names = _list(path) if kind == "folder" else []
        if _CLAIMED in names:
            kind = "claimed"
        if kind == "folder":
            for name in names:
                child = path / name
                if name.startswith("."):
                    left_out.append(("hidden", os.fspath(child), 0))
                elif _is_link(child):
                    links.append((child, _real(child)))
                else:
                    waiting.append((child, os.path.join(real, name)))
            continue
        if kind == "file":
            kind = "unknown" if kind_of(path.name) is None else "file" if size else "empty"
        if kind == "file":
            if size < _POINTER_BYTES:
                with reading(printable(os.fspath(path))), path.open("rb") as file:
                    check_no_pointer(path, file.read(_POINTER_BYTES))
            files.append((os.fspath(path), size))
        else:
            left_out.append((kind, os.fspath(path), size))
    return sorted(files), sorted(left_out)


def _look(path: epath.Path) -> tuple[str, int]:
    """What a path leads to (folder, file, special, or nothing: dangling), and its bytes."""
    try:
        if not _is_local(path):
            found = path.stat()
            return ("folder", 0) if found.is_directory else ("file", found.length)
        mode, size = (status := os.stat(path)).st_mode, status.st_size
    except OSError as error:
        missing = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)
        if isinstance(error, FileNotFoundError) or error.errno in missing:
            return "dangling", 0
        raise unreadable(printable(os.fspath(path)), error) from error
    if stat.S_ISDIR(mode):
        return "folder", 0
    return ("file", size) if stat.S_ISREG(mode) else ("special", 0)


def _list(folder: epath.Path) -> list[str]:
    """The names in a folder."""

    def fail(error: OSError) -> NoReturn:
        raise unreadable(printable(os.fspath(folder)), error) from error

    # One step of `walk` tells of a failure; `iterdir` leaves names out.
    _, folders, names = next(folder.walk(on_error=fail), (folder, [], []))
    return sorted(name for name in (*folders, *names) if name)


def _is_local(path: epath.Path) -> bool:
    return "://" not in os.fspath(path)


def _is_link(path: epath.Path) -> bool:
    return _is_local(path) and os.path.islink(path)


def _real(path: epath.Path) -> str:
    """A path without links."""
    return os.path.realpath(path) if _is_local(path) else os.fspath(path)
