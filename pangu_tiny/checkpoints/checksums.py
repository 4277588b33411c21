"""Checksums, so that a flipped bit in a checkpoint is found when it is read.

Every chunk of an array ends in its CRC-32C, which TensorStore compares whenever it reads the chunk.
All other files of a step stand with their sha256 in `about/checksums`, whose last line has that of
the lines above it: in the step's folder, `sha256sum --check about/checksums` compares them too.
"""

import hashlib
import json
import os
import pathlib
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint._src.serialization import tensorstore_utils

from pangu_tiny.topology.processes import first
from pangu_tiny.workdir import write_atomically

MARK = "_CHECKPOINT_METADATA"
"""Orbax's file in the folder of a step; without it, the step does not count."""
CHUNKS = {"values", "c"}
"""Folders of chunks, which carry their checksum themselves: in OCDBT's layout, and one by one."""
_UNLISTED = (MARK, "commit_success.txt", "about/commit_success.txt")
"""What Orbax writes as it commits, when the checksums are there; that they are text is all that can
be known of them, and nobody reads them."""
_CLOSING = b"# sha256 of the lines above: "
_CODECS = [
    {"name": "bytes", "configuration": {"endian": "little"}},
    {"name": "zstd", "configuration": {"level": 1}},
    {"name": "crc32c"},
]


def _with_checksums(build: Callable[..., Any]) -> Callable[..., Any]:
    def spec(*arguments: Any, **settings: Any) -> Any:
        made = build(*arguments, **settings)
        if made.json["driver"] == "zarr3":
            made.json["metadata"]["codecs"] = _CODECS
            if made.json["kvstore"]["driver"] == "ocdbt":
                # Apart from OCDBT's nodes: of these the merge leaves some that nothing reads.
                made.json["kvstore"]["value_data_prefix"] = "values/"
        return made

    return spec


# Orbax has no setting for it; here it makes every array that it writes, whatever its type.
tensorstore_utils.build_array_write_spec = _with_checksums(tensorstore_utils.build_array_write_spec)


def array_handler(use_ocdbt: bool = True) -> ocp.PyTreeCheckpointHandler:
    """Writes a tree of arrays with checksums; with `use_ocdbt` chunks are gathered in few files,
    else each is a file of its own."""
    handlers = ocp.type_handlers
    registry = handlers.create_type_handler_registry(
        # Neither shardings nor chunk shapes are written beside the arrays: nothing reads them.
        (jax.Array, handlers.ArrayHandler(enable_write_sharding_file=False)),
        (np.ndarray, handlers.NumpyHandler(deepcopy_host_arrays=False)),
    )
    return ocp.PyTreeCheckpointHandler(
        use_ocdbt=use_ocdbt, use_zarr3=True, type_handler_registry=registry
    )


class AboutHandler(ocp.JsonCheckpointHandler):
    """Writes `about`, which has to be the last item of a step, and before the step counts the
    checksums of what process 0 finds in it."""

    def finalize(self, directory: epath.Path) -> None:
        write_checksums(directory.parent, directory)


def write_checksums(step: epath.Path, about: epath.Path | None = None) -> None:
    """Writes the sha256 of every file of a step that is no chunk; `about` is where its item of that
    name lies, as long as it has another one."""
    about = about or step / "about"
    files = {name: step / name for name in _names(step) if not name.startswith(f"{about.name}/")}
    files |= {f"about/{name}": about / name for name in _names(about)}
    _write(about / "checksums", dict(zip(files, _digests(files.values()), strict=True)))


def drop_item(step: epath.Path, item: str) -> None:
    """Removes an item for good; the step counts without it."""
    sums = step / "about" / "checksums"
    if sums.exists():
        stays = {name: sha for name, sha in _read(step).items() if not name.startswith(f"{item}/")}
        _write(sums, stays)
    (step / item).rmtree(missing_ok=True)


def check(step: epath.Path) -> None:
    """Compares every file but the chunks with its checksum. Of a step that was written without
    checksums, process 0 says so.

    Raises:
      ValueError, OSError: names the file that is damaged or missing.
    """
    sums = step / "about" / "checksums"
    if not sums.exists():
        if _format(step) == 1:
            if first():
                line = f"checkpoint {step} was written before checksums and carries none"
                print(line, file=sys.stderr, flush=True)
            return
        raise ValueError(f"{sums} is missing")
    expected = _read(step)
    for name, found in zip(expected, _digests(step / name for name in expected), strict=True):
        if found != expected[name]:
            raise ValueError(f"{step / name} is damaged: its sha256 is not that in {sums}")
    for file in (step / name for name in _UNLISTED):
        try:
            file.exists() and file.read_bytes().decode()
        except UnicodeDecodeError:
            raise ValueError(f"{file} is damaged: it is no text") from None


def _names(folder: epath.Path) -> list[str]:
    """The files in a folder that get a checksum here."""
    root = os.fspath(folder).rpartition("://")[2]  # epath leaves gs:// out of what it walks through
    names = [
        pathlib.PurePosixPath(inner, file).relative_to(root)
        for inner, _, files in folder.walk()
        for file in files
    ]
    return [
        str(name)
        for name in names
        if not CHUNKS & set(name.parts) and name.name not in (MARK, "checksums")
    ]


def _digests(files: Iterable[epath.Path]) -> list[str]:
    with ThreadPoolExecutor(16) as readers:  # in a bucket each takes its time
        return list(readers.map(lambda file: hashlib.sha256(file.read_bytes()).hexdigest(), files))


def _write(sums: epath.Path, digests: dict[str, str]) -> None:
    lines = "".join(f"{digests[name]}  {name}\n" for name in sorted(digests)).encode()
    write_atomically(sums, lines + _CLOSING + hashlib.sha256(lines).hexdigest().encode() + b"\n")


def _read(step: epath.Path) -> dict[str, str]:
    """The sha256 of every file by its name."""
    sums = step / "about" / "checksums"
    content = sums.read_bytes()
    lines, found, closing = content.rpartition(_CLOSING)
    if not found and _format(step) == 2:  # whose file had no such line
        lines, closing = content, hashlib.sha256(content).hexdigest().encode()
    if closing.strip() != hashlib.sha256(lines).hexdigest().encode():
        raise ValueError(f"{sums} is damaged: its last line is not the sha256 of those above")
    pairs = [line.partition("  ") for line in lines.decode(errors="replace").splitlines()]
    digests = {name: digest for digest, _, name in pairs}
    if "about/metadata" not in digests:
        raise ValueError(f"{sums} is damaged: it does not list about/metadata")
    return digests


def _format(step: epath.Path) -> int:
    metadata = step / "about" / "metadata"
    try:
        return json.loads(metadata.read_text())["format"]
    except (ValueError, KeyError):
        raise ValueError(f"{metadata} is damaged") from None
