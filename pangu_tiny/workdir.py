"""The folder that a stage writes: claimed by one configuration, refused to every other."""

import contextlib
import contextvars
import errno
import fcntl
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
from etils import epath

from pangu_tiny.errors import UserError

# gcsfs keeps for good what it has listed, but other processes and TensorStore write there too.
fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False

_IDENTITY = "identity.json"
_LOCK = ".lock"
_NETWORK = ("nfs", "cifs", "smb", "fuse", "9p", "ceph", "lustre", "gpfs", "beegfs", "afs")
_locks: dict[str, int] = {}  # by folder: the open file whose lock dies with this process
_MEND = "restore it, or make its folder anew"
_EFFECTIVE_CONFIG: contextvars.ContextVar[str] = contextvars.ContextVar("effective_config")


def claim(
    workdir: str, stage: str, identity: dict[str, Any], advice: dict[str, str] | None = None
) -> epath.Path:
    """Makes `workdir` (if need be) and binds it to `stage` and `identity`; until this process, or
    `running`, ends, no other process can claim it.

    Args:
      workdir: a local path or a URL that epath knows (gs://, s3://).
      stage: the name of the stage that writes here.
      identity: JSON values that define the result. What may differ between two runs of the same
        work (mesh, processes, logging) stays out of it.
      advice: by a name in `identity`, what to do where the folder holds another value of it.

    Returns:
      The folder, as an absolute path. A folder claimed before by the same stage and identity is
      returned as it is, so that an interrupted run resumes in it.
    """
    folder = absolute(workdir)
    marker = folder / _IDENTITY
    wanted = json.loads(json.dumps({"stage": stage, **identity}))
    with naming_what_cannot_be_written(folder):
        if not marker.exists():
            if folder.exists() and not folder.is_dir():
                raise UserError(f"workdir {workdir} is a file, expected a folder or a free name")
            if folder.exists() and not all(map(_is_leftover, folder.iterdir())):
                raise UserError(f"workdir {workdir} is not empty and was not made by {stage}")
            folder.mkdir(parents=True, exist_ok=True)
        lock(folder)
    if (found := read_identity(folder)) is None:
        with naming_what_cannot_be_written(folder):
            write_atomically(marker, json.dumps(wanted, indent=2, sort_keys=True))
    elif found.get("stage") != stage:
        there = found.get("stage")
        raise UserError(f"workdir {workdir} was made by {there}, expected a folder of {stage}")
    elif found != wanted:
        differing = [name for name in wanted if found.get(name) != wanted[name]]
        lines = [difference(found, wanted), *((advice or {}).get(name, "") for name in differing)]
        raise UserError(f"workdir {workdir} holds another run: {'; '.join(filter(None, lines))}")
    _describe(folder)
    return folder


@contextlib.contextmanager
def naming_what_cannot_be_written(folder: epath.Path) -> Iterator[None]:
    """For a folder without permission, or a bucket that is not there."""
    try:
        yield
    except OSError as error:
        raise UserError(f"workdir {folder} cannot be written: {error.strerror or error}") from error


def lock(folder: epath.Path) -> None:
    """Keeps other processes from claiming a folder until this process, or `running`, ends, however
    it ends. On a file system of a network it is no more than a warning, since a machine that was
    lost may hold a lock there for a while; on gs:// there is none."""
    path = os.fspath(folder)
    if "://" in path or path in _locks:
        return
    descriptor = os.open(os.path.join(path, _LOCK), os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        holder = os.pread(descriptor, 200, 0).decode(errors="replace")
        os.close(descriptor)
        refused = f"workdir {path} is being written by {holder or 'another process'}"
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
            return  # a file system without locks
        if not _on_network(path):
            raise UserError(f"{refused}: wait for its end, or stop it") from error
        print(f"WARNING: {refused}, if that still runs", file=sys.stderr)
        return
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"process {os.getpid()} on {platform.node()}".encode(), 0)
    _locks[path] = descriptor


def _on_network(path: str) -> bool:
    """Whether a file system is shared with other machines, by the table of mounts."""
    try:
        mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    except OSError:
        return False
    inside = [mount for mount in mounts if os.path.commonpath([path, mount[1]]) == mount[1]]
    kind = max(inside, key=lambda mount: len(mount[1]))[2] if inside else ""
    return kind.startswith(_NETWORK)


@contextlib.contextmanager
def running(config: str) -> Iterator[None]:
    """The run of a stage: `claim` leaves `config` (gin bindings that give the same run) in the
    folder, and what it claims is free again at the end."""
    token = _EFFECTIVE_CONFIG.set(config)
    before = set(_locks)
    try:
        yield
    finally:
        _EFFECTIVE_CONFIG.reset(token)
        for path in set(_locks) - before:
            os.close(_locks.pop(path))


def _describe(folder: epath.Path) -> None:
    """Leaves the effective config, the package versions and the commit beside the result."""
    if text := _EFFECTIVE_CONFIG.get(""):
        write_atomically(folder / "config.gin", text)
    write_atomically(folder / "environment.json", json.dumps(environment(), indent=2))


def environment() -> dict[str, Any]:
    """Python, platform, versions of the packages that decide a result, and the git commit."""
    names = ("pangu_tiny", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain")
    versions = {}
    for name in (*names, "sentencepiece", "array_record", "tensorflow-datasets"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": versions,
        "commit": _commit(),
    }


def _commit() -> str | None:
    """The commit that this code is a checkout of; None where it was installed, or without git."""
    file = Path(__file__)

    def git(*command: str) -> str:
        return subprocess.check_output(
            ["git", "-C", file.parent, *command], stderr=subprocess.DEVNULL, text=True
        )

    try:
        git("ls-files", "--error-unmatch", file.name)  # else it lies in a stranger's checkout
        return git("rev-parse", "HEAD").strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def absolute(path: str | os.PathLike[str]) -> epath.Path:
    """The path from the root, which Orbax wants; a URL as it is."""
    scheme, is_url, _ = os.fspath(path).partition("://")
    if not is_url:
        return epath.Path(os.path.abspath(path))
    try:
        fsspec.get_filesystem_class(scheme)
    except (ImportError, ValueError) as error:
        extra = "; for gs://, pip install 'pangu_tiny[gcs]'"
        raise UserError(f"{path} cannot be opened: {error}{extra}") from error
    return epath.Path(path)


def read_identity(workdir: str | os.PathLike[str]) -> dict[str, Any] | None:
    """The identity that `claim` left in a folder, or None if there is none."""
    marker = epath.Path(workdir) / _IDENTITY
    return read_json(marker) if marker.exists() else None


def finished(kind: str, folder: str | os.PathLike[str], stage: str, file: str) -> epath.Path:
    """The file that a stage writes last, in a folder of such a kind of results."""
    path = epath.Path(folder) / file
    if path.exists():
        return path
    maker = (read_identity(folder) or {}).get("stage", stage)
    made = f" and was made by {maker}" if maker not in stage else ""
    raise UserError(f"{kind} {folder} has no {file}{made}, expected a folder that {stage} finished")


def read_json(file: epath.Path, *names: str) -> dict[str, Any]:
    """Reads a JSON object that a stage wrote and that has these names."""
    try:
        content = file.read_bytes()
        found = json.loads(content.decode())
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error}") from error
    except (ValueError, RecursionError) as error:
        what = f"is not JSON: {error}" if content.strip() else "is empty"
        raise UserError(f"{file} is damaged: it {what}; {_MEND}") from error
    if not isinstance(found, dict):
        raise UserError(f"{file} is damaged: it holds a {type(found).__name__}; {_MEND}")
    if missing := [name for name in names if name not in found]:
        raise UserError(f"{file} is damaged: it has no {missing[0]!r}; {_MEND}")
    return found


@contextlib.contextmanager
def replaced(path: epath.Path) -> Iterator[epath.Path]:
    """A temporary file to write, which becomes `path` at the end: after a kill `path` is there
    whole or not at all."""
    if "://" in os.fspath(path):  # where renaming is copying, but a file is written whole anyway
        with tempfile.TemporaryDirectory() as folder:
            temporary = epath.Path(folder) / path.name
            yield temporary
            path.write_bytes(temporary.read_bytes())
        return
    temporary = path.parent / f".{path.name}.{uuid.uuid4().hex}.tmp"
    try:
        yield temporary
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_atomically(path: epath.Path, content: str | bytes) -> None:
    """Writes a file so that after a kill it is there whole or not at all."""
    with replaced(path) as temporary:
        temporary.write_bytes(content if isinstance(content, bytes) else content.encode())


def _is_leftover(path: epath.Path) -> bool:
    """Whether a kill inside `claim` or `replaced` left this behind."""
    return path.name == _LOCK or (path.name.startswith(".") and path.name.endswith(".tmp"))


def difference(found: Any, wanted: Any, there: str = "there", here: str = "here") -> str:
    """Names every value that differs as 'name is X there, Y here', nested names with dots."""

    def walk(a: Any, b: Any, name: str) -> list[str]:
        if isinstance(a, dict) and isinstance(b, dict):
            keys = sorted(a.keys() | b.keys())
            return [
                line
                for key in keys
                for line in walk(a.get(key), b.get(key), f"{name}.{key}" if name else key)
            ]
        return [] if a == b else [f"{name} is {_shown(a)} {there}, {_shown(b)} {here}"]

    return "; ".join(walk(found, wanted, ""))


def check_same(what: str, found: Any, other: str, wanted: Any) -> None:
    """Refuses what was made of something else: 'WHAT found, OTHER wanted'."""
    if found != wanted:
        raise UserError(f"{what} {_shown(found)}, {other} {_shown(wanted)}")


def _shown(value: Any) -> str:
    """A value, or the beginning of a digest."""
    is_digest = isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value)
    return value[:12] if is_digest else repr(value)


def digest_of(facts: Any, *arrays: np.ndarray) -> str:
    """sha256 of JSON values, then of the bytes of some arrays."""
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for array in arrays:
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()
