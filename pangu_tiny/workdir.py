"""The folder that a stage writes: claimed by one configuration, refused to every other."""

import contextlib
import contextvars
import importlib.metadata
import json
import os
import platform
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from etils import epath

from pangu_tiny.errors import UserError

_IDENTITY = "identity.json"
_MEND = "restore it, or make its folder anew"
_EFFECTIVE_CONFIG: contextvars.ContextVar[str] = contextvars.ContextVar("effective_config")


def claim(workdir: str, stage: str, identity: dict[str, Any]) -> epath.Path:
    """Makes `workdir` (if need be) and binds it to `stage` and `identity`.

    Args:
      workdir: a local path or a URL that epath knows (gs://, s3://).
      stage: the name of the stage that writes here.
      identity: JSON values that define the result. What may differ between two runs of the same
        work (mesh, processes, logging) stays out of it.

    Returns:
      The folder, as an absolute path. A folder claimed before by the same stage and identity is
      returned as it is, so that an interrupted run goes on in it.

    Raises:
      UserError: the folder belongs to another stage or configuration, or holds foreign files.
    """
    folder = absolute(workdir)
    marker = folder / _IDENTITY
    wanted = json.loads(json.dumps({"stage": stage, **identity}))
    if marker.exists():
        found = read_json(marker)
        if found != wanted:
            raise UserError(f"workdir {workdir} holds another run: {_difference(found, wanted)}")
        _describe(folder)
        return folder
    if folder.exists() and not folder.is_dir():
        raise UserError(f"workdir {workdir} is a file, expected a folder or a free name")
    if folder.exists() and not all(map(_is_temporary, folder.iterdir())):
        raise UserError(f"workdir {workdir} is not empty and was not made by {stage}")
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(marker, json.dumps(wanted, indent=2, sort_keys=True))
    _describe(folder)
    return folder


def claim_together(workdir: str, stage: str, identity: dict[str, Any]) -> epath.Path:
    """`claim` for a stage of several JAX processes on one shared folder: the first process makes
    it, the others find it made and check it too, so that all of them go on, or none."""
    import jax  # not for stages that have no use for it
    from jax.experimental import multihost_utils

    if jax.process_count() == 1:
        return claim(workdir, stage, identity)
    try:
        if jax.process_index() == 0:
            return claim(workdir, stage, identity)
    finally:
        multihost_utils.sync_global_devices("claim")
    return claim(workdir, stage, identity)


@contextlib.contextmanager
def effective_config(text: str) -> Iterator[None]:
    """Within it, `claim` leaves `text` (gin bindings that give the same run) in the folder."""
    token = _EFFECTIVE_CONFIG.set(text)
    try:
        yield
    finally:
        _EFFECTIVE_CONFIG.reset(token)


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
    return epath.Path(path if "://" in os.fspath(path) else os.path.abspath(path))


def read_identity(workdir: str | os.PathLike[str]) -> dict[str, Any] | None:
    """The identity that `claim` left in a folder, or None if there is none."""
    marker = epath.Path(workdir) / _IDENTITY
    return read_json(marker) if marker.exists() else None


def read_json(file: epath.Path, *names: str) -> dict[str, Any]:
    """Reads a JSON object that a stage wrote and that has these names.

    Raises:
      UserError: the file cannot be read, or is something else: empty, say, after a power failure.
    """
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
        if isinstance(content, bytes):
            temporary.write_bytes(content)
        else:
            temporary.write_text(content)


def _is_temporary(path: epath.Path) -> bool:
    """Whether a kill inside `replaced` left this behind."""
    return path.name.startswith(".") and path.name.endswith(".tmp")


def _difference(found: Any, wanted: Any) -> str:
    """Names every value that differs as 'name is X there, Y here', nested names with dots."""

    def walk(a: Any, b: Any, name: str) -> list[str]:
        if isinstance(a, dict) and isinstance(b, dict):
            keys = sorted(a.keys() | b.keys())
            return [
                line
                for key in keys
                for line in walk(a.get(key), b.get(key), f"{name}.{key}" if name else key)
            ]
        return [] if a == b else [f"{name} is {a!r} there, {b!r} here"]

    return "; ".join(walk(found, wanted, ""))
